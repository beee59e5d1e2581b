"""The trial process itself, started by hand, with the small model."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from openpi_opt import trial
from openpi_opt.config import RACE_FILE, Config
from openpi_opt.machine import probe
from openpi_opt.measuring import raced
from openpi_opt.process.devices import LEASES_VARIABLE, measure_lock
from openpi_opt.result import Failed, Ok, parse

SMALL = {
    "model": {"name": "pi0_mini"},
    "platform": {"device": "cpu"},
    "workload": {"steps": 1, "horizon": 2, "active_cameras": [True]},
    "guard": {"inputs": 2},
    "measure": {"warmup": 3, "iterations": 10, "rel_ci": None},
}
# Beside the latency nothing is measured: no ceilings, energy or kernels.
PLAIN = {"profile": {"kernels": False, "energy": False, "roofline": "none"}}
EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def run(folder: Path, raw: dict, on_phase: Callable[[str], None] = lambda _: None) -> dict:
    config, result = folder / "config.json", folder / "result.json"
    config.write_text(json.dumps(Config.parse({**SMALL, **raw}).dump()))
    command = [sys.executable, "-m", "openpi_opt.trial", "--config", str(config)]
    command += ["--result", str(result), "--references", str(folder / "references")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("["):
                on_phase(line.strip().strip("[]"))
    assert process.returncode == 0, "".join(said)
    return json.loads(result.read_text())


def test_wrong_actions_have_no_latency(tmp_path):
    """A limit that no rounding can keep makes honest bfloat16 wrong, by the way that all take."""
    document = run(tmp_path, {"guard": {"cap": 1e-9, "floor": 1e-9, "inputs": 2}, **PLAIN})
    assert document["outcome"] == "wrong"
    assert "from the float32 reference" in document["reason"]
    assert not {"latency", "throughput_hz", "kernels", "memory"} & set(document)


def test_a_right_trial_says_how_fast_and_how_sure(tmp_path):
    document = run(tmp_path, {"precision": {"dtype": "float32"}})
    assert document["outcome"] == "ok"
    latency = document["latency"]
    assert latency["clock"] == "wall"
    assert document["fingerprint"]["torch"]["version"]
    assert latency["iterations"] == latency["samples_ms"]["count"] == 10
    assert document["schema_version"] == 3
    flagged = {check["name"] for check in document["checks"]}
    assert {"warmup", "first_run", "spread", "compile_time", "environment"} <= flagged
    assert latency["min_ms"] <= latency["p50_ms"] <= latency["p95_ms"]
    assert document["kernels"]["kind"] == "operator_calls"
    assert document["guard"]["rel_l2"] < 1e-6
    phases = {"load", "reference", "compile", "guard", "measure", "profile", "ceilings"}
    assert phases <= set(document["phase_seconds"])
    roofline = document["roofline"]
    assert roofline["ceilings"]["source"] == "measured"
    assert roofline["fraction"] == roofline["floor_ms"] / latency["mean_ms"]
    assert set(roofline["stages"]) == {"vision", "prefill", "denoise"}
    assert all(stage["fraction"] > 0 for stage in roofline["stages"].values())
    assert list((tmp_path / "ceilings").glob("*.json"))
    if document["energy"] is None:
        assert any(note.startswith("No energy: ") for note in document["notes"])
    else:
        assert document["energy"]["seconds"] >= 2


def test_a_trial_runs_against_the_fastest_of_the_moment_when_it_has_the_device(tmp_path):
    """Trials prepare beside each other: what was the fastest at the start is old by then."""
    folder = tmp_path / "trials" / "uid"
    racing = Config.parse({"limits": {"race": 1.5, "latency_ms": 90.0}})
    assert raced(racing, folder) == racing
    (tmp_path / RACE_FILE).write_text(json.dumps({racing.context_hash(): 20.0, "other": 1.0}))
    assert raced(racing, folder).limits.latency_ms == 30.0
    assert raced(racing, folder).limits.best_ms == 20.0
    assert raced(racing, folder).hash() == racing.hash()
    baseline = Config.parse({})
    assert raced(baseline, folder) == baseline  # measured however slow


def test_a_hopeless_trial_waits_for_its_turn_and_ends_early(tmp_path, monkeypatch):
    monkeypatch.setenv(LEASES_VARIABLE, str(tmp_path / "leases"))
    entered: list[str] = []

    def on_phase(phase: str) -> None:
        entered.append(phase)
        if phase == "wait":
            time.sleep(1.0)
            held.release()
        if phase == "report":  # others have the device now, and stop this trial
            found = measure_lock()
            assert found is not None
            found.release()

    measure = {**SMALL["measure"], "iterations": 100, "exclusive": True}
    for _ in range(4):  # on a busy machine 100 calls may be too noisy to be sure of anything
        held = measure_lock()  # another trial measures
        assert held is not None
        document = run(tmp_path, {"measure": measure, "limits": {"latency_ms": 1e-3}}, on_phase)
        if document["outcome"] == "pruned":
            break
    assert document["seen_calls"] in (10, 100)  # 100 where the first 10 are too noisy to tell
    assert document["kernels"]["total"] > 0
    assert entered[-3:] == ["measure", "profile", "report"]
    assert "wait" in entered
    assert document["phase_seconds"]["wait"] >= 0.9
    assert document["outcome"] == "pruned"
    assert document["limit_ms"] == 1e-3 < document["seen_low_ms"] < document["seen_mean_ms"]
    assert "surely slower than 0.001 ms" in document["reason"]
    assert "latency" not in document


@pytest.mark.parametrize("raw", [{"attention": {"vision": "aiter"}}, {"graph": {"mode": "manual"}}])
def test_what_cannot_run_here_is_unavailable_with_the_reason(tmp_path, raw):
    document = run(tmp_path, raw)
    assert document["outcome"] == "unavailable"
    assert "CPU" in document["reason"]
    assert "latency" not in document


def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_tensor(tmp_path):
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"state_proj.weight": torch.zeros(2, 2)}, path)
    document = run(tmp_path, {"weights": {"kind": "checkpoint", "path": str(path)}})
    assert document["outcome"] == "error"
    assert "state_proj.weight" in document["reason"] + document["log_tail"]


def test_as_many_calls_as_the_interval_needs_within_the_time(tmp_path):
    measure = {"rel_ci": 0.5, "iterations": 10, "max_seconds": 2}
    document = run(tmp_path, {"measure": measure, **PLAIN})
    result = parse(json.dumps(document))
    assert isinstance(result, Ok)
    latency = result.latency
    assert latency.rel_ci is not None
    assert latency.p50_low_ms is not None
    assert latency.p50_low_ms <= latency.p50_ms
    assert latency.ended in ("interval", "seconds")
    assert len(latency.planning_samples_ms) >= 10
    assert len(latency.samples_ms) == latency.iterations >= 10
    checks = {check.name: check for check in result.checks}
    assert checks["interval"].status == ("ok" if latency.rel_ci <= 0.55 else "flag")
    assert "±50.00% asked" in checks["interval"].detail
    assert checks["inputs"].detail.endswith("each with content of its own")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), "oom"),
        (MemoryError(), "oom"),
        (RuntimeError("CUDA error: out of memory"), "oom"),
        (RuntimeError("HIP error: out of memory"), "oom"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "oom"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "error"),
    ],
)
def test_memory_that_runs_out_is_an_outcome_of_its_own(tmp_path, monkeypatch, error, outcome):
    """In the process that is measured; `gpu/test_gpu.py` lets a GPU's memory really run out."""

    def build(*_: object) -> None:
        raise error

    monkeypatch.setattr("openpi_opt.runtime.build_policy", build)
    cfg, progress = Config.parse(SMALL), trial.Progress(None)
    result = trial.run(cfg, probe(), progress, tmp_path / "references", tmp_path)
    assert isinstance(result, Failed)
    assert (result.outcome, result.phase) == (outcome, "load")
    assert type(error).__name__ in result.reason
    assert type(error).__name__ in result.log_tail


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/results/*.json")), ids=str)
def test_recorded_results_of_format_1_can_be_read(path):
    result = parse(path.read_bytes())
    assert isinstance(result, Ok)
    assert result.schema_version in (1, 2, 3)
    assert parse(result.model_dump_json()) == result
    assert result.latency.mean_ms == pytest.approx(float(np.mean(result.latency.samples_ms)))
