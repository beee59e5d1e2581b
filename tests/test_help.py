"""`--help` is there before one has to wait."""

import subprocess
import sys

import pytest

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
