"""The way from a sweep to a preset that is used, with real processes and the small model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from openpi_opt.config import Config
from openpi_opt.confirm.bench import contenders
from openpi_opt.criteria import Criteria
from openpi_opt.errors import UserError
from openpi_opt.result import Latency, Ok, Refused, TrialResult
from openpi_opt.track.journal import Record

QUICK = [
    "model=pi0_mini",
    "platform=cpu",
    "workload.steps=2",
    "workload.horizon=4",
    "measure.warmup=3",
    "measure.iterations=10",
    "measure.rel_ci=null",
    "profile=none",
]
LIMITED = Criteria(limits={"latency_ms": 3.0})
SDPA = {"vision": "sdpa", "prefill": "sdpa", "denoise": "sdpa"}


def verb(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"openpi_opt.{name}", *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )


def record(raw: dict, mean_ms: float | None, role: str = "trial") -> Record:
    cfg = Config.parse({"model": {"name": "pi0_mini"}, "platform": {"device": "cpu"}, **raw})
    common = {
        "config": cfg.dump(),
        "config_hash": cfg.hash(),
        "context_hash": cfg.context_hash(),
        "started_at": "2026-01-01T00:00:00+00:00",
    }
    result: TrialResult
    if mean_ms is None:
        result = Refused(outcome="unavailable", reason="no GPU", **common)  # type: ignore[arg-type]
    else:
        latency = Latency.model_construct(mean_ms=mean_ms)
        result = Ok.model_construct(outcome="ok", latency=latency, **common)  # type: ignore[arg-type]
    return Record.model_construct(
        study="s", number=0, role=role, result=result, fingerprint_hash="f", params={}, labels={}
    )


def test_contenders_are_the_different_right_ones_fastest_first() -> None:
    one = {"attention": {"vision": "sdpa"}}
    two = {"attention": {"prefill": "sdpa"}}
    records = [
        record({}, 5.0, "baseline"),
        record({"attention": SDPA}, 4.0),
        record(one, 3.5),
        record(one, 3.0),
        record(two, 1.0, "confirm"),
        record({"graph": {"mode": "manual"}}, None),
    ]
    chosen = contenders(records)
    stages = {"vision", "prefill", "denoise"}
    assert [c.config.knobs["attention"].model_dump(include=stages) for c in chosen] == [
        {"vision": "sdpa", "prefill": "eager", "denoise": "eager"},
        SDPA,
    ]
    assert [c.mean_ms for c in chosen] == [3.0, 4.0], "the newest measurement of each"


def test_only_the_baseline_ok_leaves_the_baseline() -> None:
    (only,) = contenders([record({}, 5.0, "baseline"), record({"graph": {"mode": "manual"}}, None)])
    assert only.config.is_baseline()


def test_lossy_configurations_compete_only_when_asked() -> None:
    records = [record({}, 5.0), record({"attention": SDPA}, 4.0)]
    records.append(record({"blas": {"backend": "fp8"}}, 1.0))
    assert [c.config.lossy() for c in contenders(records)] == [False]
    assert [c.config.lossy() for c in contenders(records, allow_lossy=True)] == [True, False]


def test_what_is_over_a_limit_does_not_compete() -> None:
    records = [record({}, 5.0, "baseline"), record({"attention": SDPA}, 4.0)]
    records.append(record({"attention": {"vision": "sdpa"}}, 1.0))
    assert [c.mean_ms for c in contenders(records, criteria=LIMITED)] == [1.0]
    too_low = Criteria(limits={"latency_ms": 0.5})
    with pytest.raises(UserError, match=r"none of the 2 configurations .*latency_ms=0\.5"):
        contenders(records, criteria=too_low)


def test_a_limit_of_the_sweeps_day_ends_no_confirmation() -> None:
    """Else `pruning` would end the baseline, which is there to compare with."""
    limited = {"limits": {"latency_ms": 3.0, "peak_mib": 9.0}}
    for records in ([record({"attention": SDPA, **limited}, 2.0)], [record(limited, 2.0)]):
        (only,) = contenders(records)
        assert only.config.limits.latency_ms is None
        assert only.config.limits.peak_mib == 9.0


def test_a_study_without_an_ok_trial_is_refused() -> None:
    with pytest.raises(UserError, match="no trial with outcome ok"):
        contenders([record({}, None)])


def test_different_contexts_are_not_compared() -> None:
    records = [record({}, 5.0), record({"workload": {"batch_size": 2}}, 1.0)]
    with pytest.raises(UserError, match="cannot be compared"):
        contenders(records)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a finished study `s` in mlruns/."""
    folder = tmp_path_factory.mktemp("user")
    done = verb("sweep", "-m", "attention=sdpa", "study=s", *QUICK, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def confirmations(folder: Path) -> list[dict]:
    journal = (folder / "mlruns" / "studies" / "s" / "journal.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, journal) if line["role"] == "confirm"]


def test_promote_survives_an_interruption_and_writes_a_preset_that_is_used(swept: Path) -> None:
    command = ["s", "--name", "mine", "--rounds", "3"]
    first = subprocess.Popen(
        [sys.executable, "-m", "openpi_opt.promote", *command],
        cwd=swept,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while len(confirmations(swept)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=60)
    assert first.returncode == 130, told
    before = confirmations(swept)
    assert 2 <= len(before) < 6
    (schedule,) = (swept / "mlruns" / "studies" / "s" / "confirm").glob("schedule-*.json")
    drawn = schedule.read_bytes()

    done = verb("promote", *command, cwd=swept)
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stderr
    assert schedule.read_bytes() == drawn
    after = confirmations(swept)
    assert after[: len(before)] == before, "what was finished is kept"
    order = [key for keys in json.loads(drawn)["rounds"] for key in keys]
    assert [line["result"]["config_hash"] for line in after] == order

    document = yaml.safe_load((swept / "conf" / "preset" / "mine.yaml").read_text())
    provenance = document["provenance"]
    assert provenance["study"] == "s"
    assert provenance["processes"] == 3
    assert provenance["ci95_ms"][0] <= provenance["mean_ms"] <= provenance["ci95_ms"][1]
    assert provenance["mean_ms"] < provenance["p95_ms"] <= provenance["p99_ms"]
    assert provenance["guard"]["passed"] is True
    assert 0 <= provenance["guard"]["rel_l2"] < provenance["guard"]["tolerance"]
    assert provenance["clean"] in (True, False, None)
    assert provenance["commit"] is None or len(provenance["commit"]) == 40
    assert provenance["trial"]
    assert provenance["model"]["name"] == "pi0_mini"
    assert provenance["promise"] is None, "no promise is made with rounds fixed by hand"
    assert "winner" in done.stdout
    again = verb("promote", "s", "--name", "mine", cwd=swept)
    assert again.returncode == 2
    assert "--force" in again.stderr
    used = verb("sweep", "preset=mine", "study=used", *QUICK, cwd=swept)
    assert used.returncode == 0, used.stderr
    listing = verb("compare", "used", "--format", "json", cwd=swept)
    (trial,) = json.loads(listing.stdout)
    assert trial["outcome"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--name", "x"], "nowhere"),
        (["s", "--name", "../x"], "preset name"),
        (["s", "--name", "x", "--store", "absent"], "absent"),
        (["s", "--name", "x", "--limit", "peak_mib=1"], "keeps its limits (peak_mib=1)"),
    ],
)
def test_bad_requests_end_with_two_and_no_traceback(
    swept: Path, arguments: list[str], words: str
) -> None:
    done = verb("promote", *arguments, cwd=swept)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
