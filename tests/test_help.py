"""`--help` is there before one has to wait."""

import subprocess
import sys

import pytest

from openpi_opt.verbs import VERBS

CODE = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_module(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {"torch", "mlflow", "optuna", "matplotlib", "scipy.stats"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("verb", ["ablate", "compare", "ladder", "promote", "sweep"])
def test_nothing_heavy_is_loaded_for_help(verb: str) -> None:
    argv = [sys.executable, "-c", CODE, f"openpi_opt.{verb}"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower() or "sweep" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_ends_with_an_example(verb: str) -> None:
    argv = [sys.executable, "-m", f"openpi_opt.{verb}", "--help"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python -m openpi_opt.{verb} {VERBS[verb].example}".strip() in " ".join(
        done.stdout.partition("xample")[2].split()
    )
