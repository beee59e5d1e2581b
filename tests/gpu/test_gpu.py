"""What only a GPU can show. Run with `make test-gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distances import attended, distance

from openpi_opt import runtime
from openpi_opt.config import Config
from openpi_opt.kernels import attention
from openpi_opt.kernels.capture import CapturedCall, CaptureError
from openpi_opt.knobs.attention import Attention
from openpi_opt.machine import probe
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.ops import Segment, Visibility
from openpi_opt.pi0.workload import make_inputs
from openpi_opt.result import Ok, parse

pytestmark = pytest.mark.gpu

MACHINE = probe()
# B, S, T, Hq, Hkv, D of the full model: vision, prefill, denoising at horizon 10 and 50
STAGES = [
    (3, 256, 256, 16, 16, 72),
    (1, 788, 788, 8, 1, 256),
    (1, 11, 799, 8, 1, 256),
    (1, 51, 839, 8, 1, 256),
]


def config(raw: dict) -> Config:
    return Config.parse({"model": {"name": "pi0_mini"}, **raw}).resolved(MACHINE)


def needs_aiter(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's aiter, imported as the knob has it imported in a trial."""
    if MACHINE.aiter is None or MACHINE.aiter.kind != "amd":
        pytest.skip("AMD's aiter is not installed")
    everywhere = config({"attention": dict.fromkeys(("vision", "prefill", "denoise"), "aiter")})
    for name, value in Attention().environment(everywhere).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("shape", STAGES)
@pytest.mark.parametrize("name", ["eager", "sdpa", "aiter"])
def test_backend_against_float64(
    name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "aiter":
        needs_aiter(monkeypatch)
    batch, queries, keys, heads, kv_heads, width = shape
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(batch, queries, heads, width, **options)  # type: ignore[call-overload]
    k, v = torch.randn(2, batch, keys, kv_heads, width, **options)  # type: ignore[call-overload]
    segments: tuple[Segment, ...] = (Segment(0, queries, None),)
    mask = torch.ones(queries, keys, dtype=torch.bool, device="cuda")
    if queries != keys:
        segments = (Segment(0, 1, keys - queries + 1), Segment(1, queries, None))
        mask[0, keys - queries + 1 :] = False
    visibility = Visibility(mask[None, None], segments)
    out = attention.backend(name, "cuda")(q, k, v, visibility, width**-0.5)
    expected = attended(q, k, v, mask, width**-0.5)
    assert distance(out, expected) < 6e-3  # bfloat16 inputs and output


def prepared(raw: dict) -> tuple[runtime.Prepared, list[Inputs]]:
    cfg = config(raw)
    policy = runtime.build_policy(cfg, torch.device("cuda"))
    workload = runtime.workload_of(cfg)
    inputs = [make_inputs(workload, policy.config, seed, "cuda") for seed in range(3)]
    return runtime.apply_knobs(policy, cfg), inputs


def test_replay_follows_new_inputs() -> None:
    """A captured call returns what the uncaptured one does, for inputs it was not captured with."""
    ready, inputs = prepared({"graph": {"mode": "manual"}, "precision": {"dtype": "float32"}})
    results = [ready.call(item).clone() for item in [*inputs, inputs[0]]]
    for item, result in zip([*inputs, inputs[0]], results, strict=True):
        torch.testing.assert_close(result, ready.uncaptured(item), rtol=1e-4, atol=1e-4)
    assert (results[0] - results[1]).abs().max() > 1e-2


def test_a_failed_capture_is_an_error() -> None:
    def synchronising(inputs: Inputs) -> torch.Tensor:
        return inputs.noise * float(inputs.state.sum().item())

    _, inputs = prepared({})
    with pytest.raises(CaptureError):
        CapturedCall(synchronising)(inputs[0])
    torch.cuda.synchronize()


def test_other_shapes_than_captured_are_refused() -> None:
    ready, inputs = prepared({"graph": {"mode": "manual"}})
    ready.call(inputs[0])
    wrong = inputs[0]._replace(noise=inputs[0].noise[:, :5])
    with pytest.raises(ValueError, match="noise has shape"):
        ready.call(wrong)


@pytest.mark.parametrize("attention_name", ["eager", "sdpa", "aiter"])
@pytest.mark.parametrize("workload", ["seed_b1", "three_cameras"])
def test_trial_of_the_small_model_is_ok(
    attention_name: str, workload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention_name == "aiter":
        needs_aiter(monkeypatch)
    cameras = [True, True, workload == "three_cameras"]
    cfg = config(
        {
            "attention": dict.fromkeys(("vision", "prefill", "denoise"), attention_name),
            "graph": {"mode": "manual"},
            "workload": {"active_cameras": cameras},
        }
    )
    (tmp_path / "config.json").write_text(json.dumps(cfg.dump()))
    command = [sys.executable, "-m", "openpi_opt.trial", "--config", str(tmp_path / "config.json")]
    command += ["--result", str(tmp_path / "result.json"), "--references", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    result = parse((tmp_path / "result.json").read_bytes())
    assert isinstance(result, Ok), getattr(result, "reason", "")
    assert result.latency.clock == "device_events"
    assert result.kernels is not None
    assert result.kernels.kind == "device_kernels"
    assert result.kernels.total > 100
    assert sum(result.kernels.by_category.values()) == result.kernels.total
    assert result.kernels.busy_ms is not None
    assert result.launch_overhead_ms == result.latency.wall_mean_ms - result.kernels.busy_ms
    assert result.latency.upload_ms is not None
    assert result.latency.upload_ms > 0
    assert result.gpu is not None
    assert {"gpu_clock", "gpu_throttle", "gpu_power_limit", "gpu_shared"} <= {
        check.name for check in result.checks
    }


def test_a_gpu_without_memory_is_an_outcome_and_the_next_trial_is_fine(tmp_path: Path) -> None:
    """What is left does not hold the trial's context, or not the policy."""
    (tmp_path / "config.json").write_text(json.dumps(config({}).dump()))
    command = [sys.executable, "-m", "openpi_opt.trial", "--config", str(tmp_path / "config.json")]
    command += ["--result", str(tmp_path / "result.json"), "--references", str(tmp_path)]
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(free - (300 << 20), dtype=torch.uint8, device="cuda")
    outcomes = []
    for _ in range(2):
        subprocess.run(command, check=True, timeout=300)
        outcomes.append(parse((tmp_path / "result.json").read_bytes()).outcome)
        filler.set_()  # type: ignore[call-overload]
        torch.cuda.empty_cache()
    assert outcomes == ["oom", "ok"]
