"""`--help` is there before one has to wait, and ends with an example."""

import subprocess
import sys

import pytest

from openpi_opt.verbs import VERBS

# Runs a module as `python -m` does, and says on stderr what of the heavy libraries it has loaded.
CODE = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    heavy = {"torch", "mlflow", "optuna", "matplotlib", "scipy.stats"} & set(sys.modules)
    sys.exit(end.code or " ".join(heavy) or 0)
"""


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_loads_nothing_heavy_and_ends_with_an_example(verb):
    argv = [sys.executable, "-c", CODE, f"openpi_opt.{verb}"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python -m openpi_opt.{verb} {VERBS[verb].example}".strip() in " ".join(
        done.stdout.partition("xample")[2].split()
    )
