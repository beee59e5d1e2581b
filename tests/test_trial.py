"""The trial process itself, started by hand, with the small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from openpi_opt.config import Config

SMALL = {
    "model": {"name": "pi0_mini"},
    "platform": {"device": "cpu"},
    "workload": {"steps": 2, "horizon": 4},
    "measure": {"warmup": 3, "iterations": 10},
}


def run(folder: Path, raw: dict) -> dict:
    config, result = folder / "config.json", folder / "result.json"
    config.write_text(json.dumps(Config.parse({**SMALL, **raw}).dump()))
    command = [sys.executable, "-m", "openpi_opt.trial", "--config", str(config)]
    command += ["--result", str(result), "--references", str(folder / "references")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text())


def test_wrong_actions_have_no_latency(tmp_path: Path) -> None:
    """A limit that no rounding can keep makes honest bfloat16 wrong, by the way that all take."""
    document = run(tmp_path, {"guard": {"cap": 1e-9, "floor": 1e-9}})
    assert document["outcome"] == "wrong"
    assert "from the float32 reference" in document["reason"]
    assert not {"latency", "throughput_hz", "kernels", "memory"} & set(document)


def test_a_right_trial_says_how_fast_and_how_sure(tmp_path: Path) -> None:
    document = run(tmp_path, {"precision": {"dtype": "float32"}})
    assert document["outcome"] == "ok"
    latency = document["latency"]
    assert latency["clock"] == "wall"
    assert document["fingerprint"]["torch"]["version"]
    assert latency["iterations"] == len(latency["samples_ms"]) == 10
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


@pytest.mark.parametrize("raw", [{"attention": {"vision": "aiter"}}, {"graph": {"mode": "manual"}}])
def test_what_cannot_run_here_is_unavailable_with_the_reason(tmp_path: Path, raw: dict) -> None:
    document = run(tmp_path, raw)
    assert document["outcome"] == "unavailable"
    assert "CPU" in document["reason"]
    assert "latency" not in document


def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"state_proj.weight": torch.zeros(2, 2)}, path)
    document = run(tmp_path, {"weights": {"kind": "checkpoint", "path": str(path)}})
    assert document["outcome"] == "error"
    assert "state_proj.weight" in document["reason"] + document["log_tail"]
