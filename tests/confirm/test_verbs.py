"""The confirming verbs as programs, with real processes and the small model."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from quick import QUICK


def verb(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"openpi_opt.{name}", *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A working folder with a finished study `s` in mlruns/, which has asked the guard."""
    folder = tmp_path_factory.mktemp("user")
    words = [*QUICK, "study=s", "tracking=none", "guard.seconds=3"]
    done = verb("sweep", "-m", "attention=sdpa", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    seen = json.loads((folder / "mlruns" / "studies" / "s" / "guard.json").read_text())
    (power,) = seen.values()  # of the baseline and another configuration
    assert power["asked"] >= 1
    assert f"{power['asked']} of {power['known']} mistakes asked" in done.stdout
    return folder


def confirmations(folder: Path) -> list[dict]:
    journal = (folder / "mlruns" / "studies" / "s" / "journal.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, journal) if line["role"] == "confirm"]


def test_promote_survives_an_interruption_and_writes_a_preset_that_is_used(swept):
    command = ["s", "--name", "mine", "--rounds", "3", "--no-mlflow"]
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
    assert provenance["guard"]["power"]["asked"] >= 1, "as the study found it"
    assert provenance["clean"] in (True, False, None)
    assert provenance["commit"] is None or len(provenance["commit"]) == 40
    assert provenance["trial"]
    assert provenance["model"]["name"] == "pi0_mini"
    assert provenance["promise"] is None, "no promise is made with rounds fixed by hand"
    assert "winner" in done.stdout
    again = verb("promote", "s", "--name", "mine", cwd=swept)
    assert again.returncode == 2
    assert "--force" in again.stderr
    used = verb("sweep", "preset=mine", "study=used", "tracking=none", *QUICK, cwd=swept)
    assert used.returncode == 0, used.stderr
    listing = verb("compare", "used", "--format", "json", cwd=swept)
    (trial,) = json.loads(listing.stdout)
    assert trial["outcome"] == "ok"


def test_ladder_and_a_second_one_that_needs_no_process(tmp_path):
    command = ["attention=sdpa", *QUICK, "--rounds", "3", "--out", "found", "--no-mlflow"]
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


def test_pairs_of_real_processes_tell_their_phases(tmp_path):
    command = [*QUICK, "--b", "attention=sdpa", "--minutes", "0.00001", "--no-mlflow"]
    done = verb("pairs", *command, cwd=tmp_path)
    assert done.returncode == 2
    assert "was enough for 0 round(s)" in done.stderr
    assert "Traceback" not in done.stderr
    found = [json.loads(file.read_text()) for file in sorted(tmp_path.rglob("result.json"))]
    assert [each["outcome"] for each in found] == ["ok", "ok"]
    for each in found:
        seconds = each["phase_seconds"]
        assert {"start", "import", "wait", "load", "measure"} <= set(seconds)
        assert 0.05 < seconds["start"] < 60
        assert seconds["import"] > seconds["load"] / 100
        assert each["latency"]["iterations"] == 10
    assert "(known)" in verb("pairs", *command, cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("promote", ["nowhere", "--name", "x"], "nowhere"),
        ("promote", ["s", "--name", "../x"], "preset name"),
        ("promote", ["s", "--name", "x", "--store", "absent"], "absent"),
        ("promote", ["s", "--name", "x", "--limit", "peak_mib=1"], "its limits (peak_mib=1)"),
        ("ladder", [*QUICK], "is the baseline itself"),
        ("ablate", [*QUICK], "is the baseline itself"),
        ("pairs", [*QUICK], "A and B compute the same"),
        ("pairs", [*QUICK, "--b", "workload=openpi"], "cannot be compared"),
        ("pairs", [*QUICK, "--b", "graph=manual"], "B (graph=manual) cannot run here"),
        ("pairs", [*QUICK, "--b", "attention=sdp"], "sdp"),
    ],
)
def test_bad_requests_end_with_two_and_no_traceback(swept, name, arguments, words):
    done = verb(name, *arguments, cwd=swept)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
