"""Experiments: what is run, and the report of what came of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from track_samples import ENERGY, FINGERPRINT, config, failed, ok, record, roofline

from openpi_opt import experiment
from openpi_opt.errors import UserError
from openpi_opt.figures import FIGURES
from openpi_opt.paths import conf_dir
from openpi_opt.result import Energy, Ok
from openpi_opt.track.journal import Journal


def measured(batch: int, mean_ms: float, energy: Energy | None = None, **knobs: Any) -> Ok:
    result = ok(mean_ms, config(workload={"name": "seed_b1", "batch_size": batch}, **knobs))
    return result.model_copy(update={"energy": energy, "throughput_hz": batch * 1000 / mean_ms})


def write(tmp_path: Path, results: list[Any], command: tuple[str, ...] = ()) -> Path:
    study = tmp_path / "studies" / "s"
    journal = Journal.open(study, command)
    for result in results:
        batch = result.config["workload"]["batch_size"]
        journal.append(record(result, params={"workload.batch_size": str(batch)}))
    return study


def entries(folder: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())["rows"]
    return rows


@pytest.mark.parametrize("path", sorted((conf_dir() / "experiment").glob("*.yaml")))
def test_every_experiment_names_known_columns_and_sweeps_its_x(path):
    if path.stem == "instances":
        with pytest.raises(UserError, match="is no study"):
            experiment.Experiment.load(path.stem)
        return
    found = experiment.Experiment.load(path.stem)
    assert any(line.startswith(f"{found.x}=") and "," in line for line in found.overrides)


def test_a_report_has_every_batch_size_in_order_also_the_one_that_failed(tmp_path):
    big = failed("out of memory", config(workload={"name": "seed_b1", "batch_size": 64}))
    results = [measured(16, 80.0), measured(1, 10.0), big, measured(4, 24.0)]
    study = write(
        tmp_path, results, ("experiment=batch_scaling", "preset=h100", "measure.warmup=3")
    )
    files = experiment.write_report("batch_scaling", study, tmp_path / "out")
    assert [file.suffix for file in files] == [".md", ".json", ".png", ".svg"]
    rows = entries(tmp_path / "out", "batch_scaling")
    assert [row["workload.batch_size"] for row in rows] == [1, 4, 16, 64]
    assert [row["mean_ms"] for row in rows] == [10.0, 24.0, 80.0, None]
    assert [row["samples_per_s"] for row in rows[:3]] == pytest.approx([100, 4000 / 24, 200])
    assert rows[3]["reason"] == "out of memory"
    assert {row["configuration"] for row in rows} == {"preset=h100"}
    text = files[0].read_text()
    assert "| preset=h100 | 64 | crashed |" in text
    assert "| crashed | 2 |" in text, "the trial that the remark below names"
    said = "1200 of 1980 MHz before"
    assert f"- flagged gpu_clock: 1 ({said}), 3 ({said}), 0 ({said})" in text
    assert rows[0]["flags"] == [f"gpu_clock: {said}"]
    assert rows[3]["flags"] == []
    assert "- out of memory (trial 2)" in text
    assert "| preset=h100 | 16 | 80.000 | 79.750 to 80.250 | 200.00 | 5.000 |" in text


def test_floors_and_shares_of_stages_stand_beside_the_latency(tmp_path):
    result = measured(1, 10.0).model_copy(update={"roofline": roofline()})
    experiment.write_report("batch_scaling", write(tmp_path, [result]), tmp_path)
    assert (
        "| 10.000 | 4.000 | 40.0% | vision 25% | 900.0 |"
        in (tmp_path / "batch_scaling.md").read_text()
    )


def test_an_interval_that_reaches_zero_is_a_rate_without_an_upper_end(tmp_path):
    wild = measured(1, 10.0)
    latency = wild.latency.model_copy(update={"ci95_low_ms": -3.0, "ci95_high_ms": 23.0})
    study = write(tmp_path, [wild.model_copy(update={"latency": latency}), measured(2, 12.0)])
    files = experiment.write_report("batch_scaling", study, tmp_path)
    assert files[-1].suffix == ".svg"
    rates = FIGURES["samples_per_s"].interval
    assert rates is not None
    assert rates(wild.model_copy(update={"latency": latency}))[1] is None


def test_energy_is_shown_where_measured_and_nowhere_else(tmp_path, capsys):
    sdpa = {"attention": {"vision": "sdpa", "prefill": "sdpa", "denoise": "sdpa"}}
    study = tmp_path / "studies" / "s"
    journal = Journal.open(study)
    journal.append(record(measured(4, 20.0, ENERGY), role="baseline"))
    params = {"attention": "sdpa", "workload.batch_size": "4"}
    journal.append(record(measured(4, 10.0, None, **sdpa), params=params))
    experiment.write_report("perf_per_watt", study, tmp_path / "out")
    sdpa_row, base = entries(tmp_path / "out", "perf_per_watt")
    assert (base["configuration"], sdpa_row["configuration"]) == ("baseline", "attention=sdpa")
    assert (base["joule"], base["hz_per_limit_watt"]) == (5.0, 0.2)
    assert sdpa_row["joule"] is None
    out = capsys.readouterr().out
    assert (
        "| baseline | 4 | 20.000 | 200.00 | 5.000 | 500.0 | 90.0 | 0.800 | 0.2500 | 0.2000 |" in out
    )
    assert "| attention=sdpa | 4 | 10.000 | 400.00 | not measured |" in out


def test_trials_of_an_older_machine_are_left_out(tmp_path):
    old = measured(1, 99.0).model_copy(update={"fingerprint": {**FINGERPRINT, "cpu": "old"}})
    study = write(tmp_path, [old, measured(1, 10.0)])
    experiment.write_report("batch_scaling", study, tmp_path)
    assert [row["mean_ms"] for row in entries(tmp_path, "batch_scaling")] == [10.0]


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    study = write(tmp_path, [measured(1, 10.0)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write in.*\n.*--out FOLDER"):
        experiment.write_report("batch_scaling", study, tmp_path / "file" / "out")


def test_the_sweep_gets_the_experiments_overrides_but_for_what_is_given(tmp_path):
    seen: list[str] = []

    def sweep(words: Sequence[str]) -> int:
        seen[:] = words
        return 1

    words = ["experiment=batch_scaling", f"store={tmp_path}/x", "preset=h100", "out=o"]
    assert experiment.run([*words, "workload.batch_size=1,2"], sweep) == 1
    assert seen[:3] == ["-m", f"store={tmp_path}/x", "preset=h100"]
    assert "workload.batch_size=1,2" in seen
    assert "baseline=false" in seen
    assert not any("1,2,4" in word or word.startswith(("experiment", "out=")) for word in seen)
    (study,) = (word for word in seen if word.startswith("study="))
    assert "batch_scaling" in study
    experiment.run([*words, "study=mine"], sweep)
    assert [word for word in seen if word.startswith("study=")] == ["study=mine"]
    assert "workload.batch_size=1,2,4,8,16,32,64" in seen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=nope"], "batch_scaling, instances, perf_per_watt"),
        (["experiment=batch_scaling", "out="], "out no value"),
        (["experiment=batch_scaling", "attention=["], "not an override"),
    ],
)
def test_wrong_words_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        experiment.run(words, lambda: 0)
