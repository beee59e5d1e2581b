"""`--help` is there before one has to wait, and ends with an example."""

import os
import subprocess
import sys

import pytest

from openpi_opt.paths import package_dir
from openpi_opt.verbs import VERBS

# Runs a module as `python -m` does, and says on stderr what of the heavy libraries it has loaded.
CODE = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    heavy = {"torch", "mlflow", "optuna", "matplotlib", "scipy.stats"} & set(sys.modules)
    heavy |= {"rich", "numpy"} & set(sys.modules) if sys.argv[0].endswith("sweep.py") else set()
    sys.exit(end.code or " ".join(heavy) or 0)
"""


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_loads_nothing_heavy_and_ends_with_an_example(verb, tmp_path):
    argv = [sys.executable, "-c", CODE, f"openpi_opt.{verb}"]
    env = os.environ | {"PYTHONPATH": str(package_dir().parent)}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python -m openpi_opt.{verb} {VERBS[verb].example}".strip() in " ".join(
        done.stdout.partition("xample")[2].split()
    )
    assert list(tmp_path.iterdir()) == []
    if verb == "sweep":
        words = ("attention: aiter, cudnn, eager", "n_trials=50", "Exit code:")
        assert [word for word in words if word not in done.stdout] == []
