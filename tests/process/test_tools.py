"""A trial under a vendor's profiler: with a program in its place, and what is refused."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path

import pytest

from openpi_opt.config import Config
from openpi_opt.machine import probe
from openpi_opt.measure import profile
from openpi_opt.process.run import TOOLS, refused, run_trial
from openpi_opt.result import Ok

MINI = {
    "model": {"name": "pi0_mini"}, "platform": {"device": "cpu"}, "guard": {"inputs": 2},
    "workload": {"steps": 1, "horizon": 2, "active_cameras": [True]},
    "measure": {"iterations": 10, "max_iterations": 10},
}  # fmt: skip


def config(tool: str) -> Config:
    asked = {"tool": tool, "energy": False, "roofline": "none", "trace": True}
    return Config.parse({**MINI, "profile": asked}).resolved(probe())


@pytest.fixture
def nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What it was called with; it becomes the trial, as a profiler starts one."""
    words = tmp_path / "words"
    program = tmp_path / "bin" / "nsys"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" > {words}\n'
        f'while [ "$1" != "{sys.executable}" ]; do shift; done\nexec "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return words


def test_the_whole_trial_runs_under_the_tool(tmp_path: Path, nsys: Path) -> None:
    folder = tmp_path / "trial"
    result = run_trial(config("nsys"), folder, tmp_path / "references", lambda phase: None)
    assert isinstance(result, Ok), result
    assert nsys.read_text().startswith("profile --trace cuda,nvtx --capture-range ")
    target = f"--output {folder}/profile/trace"
    assert f"{target} {sys.executable} -m openpi_opt.trial" in nsys.read_text()
    assert result.kernels is None
    assert "Run under nsys: all times are those under it." in result.notes


def test_a_latency_under_a_tool_is_no_answer_for_the_configuration() -> None:
    plain, under = config("none"), config("nsys")
    assert plain.hash() != under.hash()
    assert plain.context_hash() != under.context_hash()
    assert plain.hash() == Config.parse(MINI).resolved(probe()).hash()


@pytest.mark.parametrize("tool", ["rocprofv3", "ncu", "nsys"])
def test_a_tool_that_cannot_be_used_is_refused(
    tool: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = refused(config(tool), probe())
    assert found is not None
    assert "this trial runs on cpu" in found.reason
    monkeypatch.setitem(TOOLS, tool, ("cpu", ""))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = refused(config(tool), probe())
    assert found is not None
    assert (found.outcome, "no such program" in found.reason) == ("unavailable", True)


def test_generated_code_is_kept(tmp_path: Path) -> None:
    from torch._inductor.codecache import PyCodeCache

    PyCodeCache.load("generated = 1\n")
    (said,) = profile.keep_generated_code(tmp_path / "inductor.tar.gz")
    with tarfile.open(tmp_path / "inductor.tar.gz") as archive:
        files = [archive.extractfile(name) for name in archive.getnames()]
        codes = [file.read() for file in files if file is not None]
    assert f"{len(codes)} modules" in said
    assert b"generated = 1\n" in codes
