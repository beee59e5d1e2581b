"""`ladder` and `ablate` from the command line, with real processes and the small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

QUICK = [
    "model=pi0_mini",
    "platform=cpu",
    "workload.steps=1",
    "workload.horizon=2",
    "measure.iterations=10",
    "measure.warmup=3",
    "measure.rel_ci=null",
    "profile=none",
]


def verb(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"openpi_opt.{name}", *arguments, "--no-mlflow"]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )


def test_ladder_and_a_second_one_that_needs_no_process(tmp_path: Path) -> None:
    command = ["attention=sdpa", *QUICK, "--rounds", "3", "--out", "found"]
    done = verb("ladder", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "found" / "ladder.json").read_text())
    assert [rung["added"] for rung in document["rungs"]] == ["baseline", "+ attention=sdpa"]
    assert [len(rung["means_ms"]) for rung in document["rungs"]] == [3, 3]
    assert document["model"] == "pi0_mini"
    assert (tmp_path / "found" / "ladder.md").read_text() == done.stdout
    assert (tmp_path / "found" / "ladder.png").exists()
    again = verb("ladder", *command, cwd=tmp_path)
    assert again.stdout == done.stdout
    assert again.stderr.count("(known)") == 6


def test_bad_requests_end_with_two_and_no_traceback(tmp_path: Path) -> None:
    for name in ("ladder", "ablate"):
        done = verb(name, *QUICK, cwd=tmp_path)
        assert done.returncode == 2
        assert "is the baseline itself" in done.stderr
        assert "Traceback" not in done.stderr
