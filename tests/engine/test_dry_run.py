"""`--dry-run`: what it says, and that it starts, imports and writes nothing that it need not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from search_samples import CPU, FakeRun, ok
from space_samples import MACHINES, CommandLines, command_lines

from openpi_opt.config import Config
from openpi_opt.engine.display import Display, label
from openpi_opt.engine.dry_run import print_dry_run
from openpi_opt.engine.plan import StudyRequest, enumerated
from openpi_opt.engine.study import run_study
from openpi_opt.machine import Machine
from openpi_opt.paths import package_dir
from openpi_opt.space.points import Points
from openpi_opt.space.prepare import prepare
from openpi_opt.space.settings import Settings
from openpi_opt.track.journal import Journal

# Says on stderr what is imported of the heavy libraries, and which processes are started. git is
# asked for the revision of the sources, which belongs to the fingerprint.
WATCHED = """
import subprocess, sys
def watch(event, args):
    if event == "import" and args[0] in {"torch", "optuna", "mlflow", "triton", "pandas"}:
        print("imports", args[0], file=sys.stderr)
    if event == "subprocess.Popen" and not str(args[0]).endswith("git"):
        print("starts", args[:2], file=sys.stderr)
sys.addaudithook(watch)
from openpi_opt import sweep
from openpi_opt.cli import run
run(sweep.main)
"""


def dry(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(package_dir().parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", WATCHED, "--dry-run", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    "words",
    [["space=full"], ["-m", "attention=sdpa,eager", "compile=off,default"], ["attention=sdpa"]],
    ids=" ".join,
)
def test_it_imports_nothing_heavy_and_writes_nothing(tmp_path: Path, words: list[str]) -> None:
    done = dry(tmp_path, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    assert "dry run, nothing is started or written" in done.stdout
    raw, sensible, distinct = counts(done.stdout)
    assert raw >= sensible >= distinct >= 1
    assert (raw > 10**9) == (words == ["space=full"])


def counts(text: str) -> tuple[int, ...]:
    number = r"(?:about )?([\d,]+)"
    found = re.search(f"ions: {number} as written, {number} sensible, {number} different", text)
    assert found, text
    return tuple(int(number.replace(",", "")) for number in found.groups())


@pytest.fixture(scope="module")
def lines() -> CommandLines:
    return command_lines()


def text_of(
    lines: CommandLines,
    capsys: pytest.CaptureFixture,
    *words: str,
    machine: Machine = CPU,
    limit: int = 50,
    code: int = 0,
    **settings: object,
) -> str:
    space, compose = lines(*words)
    parsed = Settings.parse({"store": "/nonexistent", **settings})
    allow_lossy = parsed.objective.allow_lossy
    space, found = prepare(space, compose, machine, allow_lossy)
    request = StudyRequest("s", space, parsed, machine)
    points = Points(space, compose, machine, allow_lossy)
    assert print_dry_run(request, points, found, limit) == code
    return capsys.readouterr().out


def test_what_is_typed_is_listed_in_order_with_what_has_no_process(
    lines: CommandLines, capsys: pytest.CaptureFixture
) -> None:
    shown = text_of(lines, capsys, "attention=sdpa,triton", "compile.scope=stage,call")
    listed = [
        line.split(None, 1)[1] for line in shown.splitlines() if re.match(r" +\d+  att", line)
    ]
    assert listed == [
        "attention=sdpa compile.scope=stage",
        "attention=triton compile.scope=stage  [no process: unavailable]",
    ]
    assert counts(shown) == (4, 2, 1)
    assert re.search(r"^  2 unavailable: attention=triton needs a GPU", shown, re.MULTILINE)
    assert "baseline first" in shown


def test_a_named_space_lists_only_what_is_started(
    lines: CommandLines, capsys: pytest.CaptureFixture
) -> None:
    shown = text_of(lines, capsys, "space=ladder", "graph=none", limit=4)
    listed = re.findall(r"^ +\d+  (step=\S+)(.*)$", shown, re.MULTILINE)
    assert listed == [
        (f"step={step}", "")
        for step in ("1_baseline", "3_cached_keys", "4_fused_projections", "5_vision_qkv")
    ]
    assert "... and 2 more; --limit 6 lists them" in shown
    assert counts(shown) == (7, 7, 6)


def test_nothing_would_run(lines: CommandLines, capsys: pytest.CaptureFixture) -> None:
    shown = text_of(lines, capsys, "space=attention", "graph=manual", code=1)
    assert shown.splitlines()[-1] == "nothing would run"
    assert counts(shown)[1:] == (0, 0)


def test_a_sampler_begins_with_the_starts_that_can_run(
    lines: CommandLines, capsys: pytest.CaptureFixture
) -> None:
    shown = text_of(lines, capsys, "space=full", "platform=cuda", machine=MACHINES["h100"])
    begins = shown.split("begins with:\n")[1].split("then stages chooses from:\n")
    assert [line.split(":")[0].strip() for line in begins[0].splitlines()] == [
        "searched",
        "expert_layer",
        "captured",
        "sdpa_compiled",
    ]
    assert re.search(r"^  graph +none manual$", begins[1], re.MULTILINE)
    assert " fp8" not in begins[1], "the option; blas.fp8.stages is a key"
    assert "lossy: blas=fp8" in shown
    allowed = text_of(
        lines,
        capsys,
        "space=full",
        "platform=cuda",
        machine=MACHINES["h100"],
        objective={"allow_lossy": True},
    )
    assert " fp8" in allowed.split("chooses from:")[1]


def test_what_the_journal_knows_is_said_and_nothing_is_touched(
    lines: CommandLines, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = ("attention=sdpa,eager", "compile.mode=off,default", "tracking=none")
    space, compose = lines(*words)
    settings = Settings.parse({"store": str(tmp_path / "store"), "n_trials": 3, "sampler": "grid"})
    fake = FakeRun(lambda cfg: ok(cfg, 12.5))
    run_study(StudyRequest("s", space, settings, CPU), compose, Display(), fake)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    shown = text_of(lines, capsys, *words, store=str(tmp_path / "store"))
    assert "1  attention=sdpa compile.mode=off  [known: trial 1 ok 12.500 ms]" in shown
    assert "baseline first  [known: trial 0 ok 12.500 ms]" in shown
    assert re.search(r"4  attention=eager compile.mode=default$", shown, re.MULTILINE)
    assert "3 of 4 would be answered from the journal" in shown
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_no_more_is_composed_than_n_trials_ask_for(
    lines: CommandLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, compose = lines("weights.seed=range(0,100000)")
    request = StudyRequest("s", space, Settings.parse({"n_trials": 3, "sampler": "grid"}), CPU)
    points, composed = Points(space, compose, CPU), []
    config = points.config
    monkeypatch.setattr(points, "config", lambda params: composed.append(params) or config(params))
    assert len(list(enumerated(request, points))) == len(composed) == 3


def test_dry_run_and_sweep_agree_on_what_runs(
    lines: CommandLines, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    stages = (f"attention.{stage}=eager,sdpa" for stage in ("vision", "prefill", "denoise"))
    words = ("space=attention", "tracking=none", *stages)
    shown = text_of(lines, capsys, *words)
    space, compose = lines(*words)
    space, _ = prepare(space, compose, CPU, allow_lossy=False)
    settings = Settings.parse({"store": str(tmp_path / "store")})
    fake = FakeRun(lambda cfg: ok(cfg, 12.5))
    outcome = run_study(StudyRequest("s", space, settings, CPU), compose, Display(), fake)
    listed = re.findall(r"^ +\d+  (\S.*)$", shown, re.MULTILINE)
    records = Journal.read(tmp_path / "store" / "studies" / "s").records()
    ran = [
        label(Config.load(record.result.config), "trial", record.params)
        for record in records
        if record.role == "trial"
    ]
    assert [line for line in listed if "known" not in line][1:] == ran  # the first is the baseline
    assert len(fake.ran) == 16
    assert outcome.exit_code == 0
