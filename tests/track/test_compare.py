import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from track_samples import ENERGY, config, failed, ok, record, roofline, wrong

from openpi_opt.compare import main
from openpi_opt.track.journal import Journal
from openpi_opt.track.store import Store


@pytest.fixture
def store(tmp_path):
    journal = Journal.open(Store.open(tmp_path).study_dir("first"))
    fast = config(attention={"vision": "sdpa"})
    journal.append(record(failed('exit, code "1"\nand more'), params={"compile": "default"}))
    journal.append(record(ok(20.0), role="baseline"))
    journal.append(
        record(ok(10.0, fast), params={"attention.vision": "sdpa"}, trial_dir="trials/2")
    )
    journal.append(record(wrong()))
    return str(tmp_path)


def verb(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "openpi_opt.compare", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_table(store):
    done = verb("first", "--store", store)
    assert done.returncode == 0
    assert done.stderr == f"see it: python -m openpi_opt.ui first --store {store}\n"
    assert done.stdout.startswith("pi0_mini on cpu (AMD EPYC), workload seed_b1\n")
    assert "2.00x" in done.stdout
    assert "vision=sdpa prefill=eager denoise=eager" in done.stdout  # not cut in a pipe
    assert 'exit, code "1" and more' in done.stdout


def test_further_columns(store, capsys):
    assert main(["first", "--store", store, "--columns", "p95_ms,p99_ms"]) == 0
    out = capsys.readouterr().out
    heads = [line.split() for line in out.splitlines() if "p99" in line]
    assert heads[0][-2:] == ["p95", "p99"]
    with pytest.raises(SystemExit):
        main(["first", "--store", store, "--columns", "p98"])
    assert "'p98' is no figure; they are mean_ms" in capsys.readouterr().err


def test_json(store, capsys):
    assert main(["first", "--store", store, "--format", "json"]) == 0
    trials = json.loads(capsys.readouterr().out)
    assert [trial["number"] for trial in trials] == [0, 1, 2, 3]
    crashed, baseline, fast, wrong_one = trials
    assert crashed["outcome"] == "crashed"
    assert crashed["reason"] == 'exit, code "1"\nand more'  # whole, unlike in the table
    assert crashed["latency"] is None
    assert baseline["role"] == "baseline"
    assert fast["best"] is True
    assert fast["vs_baseline"] == 2.0
    assert fast["latency"]["mean_ms"] == 10.0
    assert not [name for name in fast["latency"] if name.endswith("samples_ms")]
    assert fast["latency"]["upload_ms"] == 0.25
    assert fast["flags"] == ["gpu_clock: 1200 of 1980 MHz before"]
    assert [check["status"] for check in fast["checks"]] == ["ok", "flag", "unknown"]
    assert fast["compilation"]["graph_breaks"] == {"print": 2}
    assert crashed["checks"] is None
    assert fast["kernels"]["total"] == 321
    assert fast["trial_dir"] == f"{store}/studies/first/trials/2"
    assert fast["params"] == {"attention.vision": "sdpa"}
    assert wrong_one["guard"]["passed"] is False
    assert wrong_one["latency"] is None


def test_csv(store, capsys):
    assert main(["first", "--store", store, "--format", "csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(lines) == 4
    assert lines[2]["latency.mean_ms"] == "10.0"
    assert lines[2]["labels.attention"] == "vision=sdpa prefill=eager denoise=eager"
    assert lines[2]["flags"] == "gpu_clock: 1200 of 1980 MHz before"
    assert lines[2]["latency.upload_ms"] == "0.25"
    assert "checks" not in lines[2]
    assert lines[0]["latency.mean_ms"] == lines[3]["latency.mean_ms"] == ""
    assert lines[3]["guard.rel_l2"] == "0.002"
    assert lines[0]["reason"] == 'exit, code "1"\nand more'
    assert not {"latency", "guard", "kernels"} & lines[0].keys()


def test_a_running_sweep_is_left_alone(store):
    path = Path(store) / "studies/first/journal.jsonl"
    with path.open("a") as file:
        file.write('{"half')
    done = verb("first", "--store", store, "--format", "json")
    assert done.returncode == 0
    assert len(json.loads(done.stdout)) == 4
    assert done.stderr.startswith("note: ")
    assert path.read_text().endswith('{"half')


def test_study_without_trials(tmp_path):
    Journal.open(Store.open(tmp_path).study_dir("empty"))
    for form, out in (("table", ""), ("json", "[]\n")):
        done = verb("empty", "--store", str(tmp_path), "--format", form)
        assert (done.returncode, done.stdout) == (0, out)
        assert "no finished trial yet" in done.stderr


@pytest.mark.parametrize("study", ["frist", "../first", "", "a/b"])
def test_unknown_study(store, study):
    done = verb(study, "--store", store)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(r"error: (study|.* is no folder of a study)", done.stderr)
    assert len(done.stderr.splitlines()) <= 3
    if study == "frist":
        assert "Did you mean first?" in done.stderr


def test_unknown_store_is_not_made(tmp_path):
    done = verb("first", "--store", str(tmp_path / "absent"))
    assert done.returncode == 2
    assert "does not exist" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_track_verb_errors(store):
    command = [sys.executable, "-m", "openpi_opt.track", "sync", "nothing", "--store", store]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: study 'nothing'")


@pytest.mark.parametrize(("more", "form"), [(0, "csv"), (60, "json")])
def test_reader_that_is_gone(store, more, form):
    """Met while printing much, or little at the very end."""
    journal = Journal.open(Path(store) / "studies/first")
    for _ in range(more):
        journal.append(record())
    reader, out = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "openpi_opt.compare", "first", "--store", store]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [*command, "--format", form], stdout=out, stderr=subprocess.PIPE, env=buffered
    )
    os.close(out)
    assert (done.stderr, done.returncode) == (b"", 141)


def test_stages_stand_against_their_floors(tmp_path, capsys):
    journal = Journal.open(Store.open(tmp_path).study_dir("s"))
    full = ok(10.0).model_copy(update={"roofline": roofline()})
    journal.append(record(ok(10.0)))
    assert main(["s", "--store", str(tmp_path)]) == 0
    assert "floor of time" not in capsys.readouterr().out
    journal.append(record(full))
    journal.append(record(full, role="confirm"))  # is not profiled
    assert main(["s", "--store", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.split("floor of time")[1].splitlines()
    assert rows[1].split() == ["#", "call", "vision", "prefill"]
    assert " ".join(rows[3].split()) == "1 4.000 of 10.000 40.0% 1.000 of 4.000 25.0% 3.000"
    assert len(rows) == 4


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_roofline_and_energy(tmp_path, capsys, kind):
    journal = Journal.open(Store.open(tmp_path).study_dir("s"))
    more = {"roofline": roofline("datasheet"), "energy": ENERGY}
    journal.append(record(ok(10.0)))
    journal.append(record(ok(10.0).model_copy(update=more)))
    assert main(["s", "--store", str(tmp_path), "--format", kind]) == 0
    out = capsys.readouterr().out
    if kind == "json":
        plain, full = json.loads(out)
        assert (plain["roofline"], plain["energy"]) == (None, None)
        assert full["energy"]["joule"] == 5.0
        assert full["roofline"]["fraction"] == 0.4
        assert full["roofline"]["ceilings"] == "datasheet"
        assert full["roofline"]["stages"]["vision"]["fraction"] == 0.25
    else:
        plain, full = csv.DictReader(io.StringIO(out))
        assert (plain["roofline.fraction"], plain["energy.joule"]) == ("", "")
        assert (full["roofline.fraction"], full["energy.joule"]) == ("0.4", "5.0")
