"""Run `*_interpreted.py` where Triton interprets: decided once, when Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", ["triton_interpreted.py", "expert_layer_interpreted.py"])
def test_in_interpreter_mode(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", f"tests/kernels/{file}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command += ["-p", "no:cacheprovider"]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
