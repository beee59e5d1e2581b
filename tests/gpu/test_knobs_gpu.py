"""Compilation with graph capture, TF32 and FP8 on a GPU. Run with `make test-gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openpi_opt import runtime
from openpi_opt.config import Config
from openpi_opt.errors import RefusedError
from openpi_opt.kernels import fp8
from openpi_opt.knobs import BY_NAME, KNOBS
from openpi_opt.machine import probe
from openpi_opt.measure.guard import distance
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.layers import Linear
from openpi_opt.pi0.ops import Ops
from openpi_opt.pi0.workload import make_inputs

pytestmark = pytest.mark.gpu

MACHINE = probe()
SDPA = dict.fromkeys(("vision", "prefill", "denoise"), "sdpa")


def plain_and_candidate(raw: dict[str, Any]) -> tuple[runtime.Prepared, list[Inputs], list[float]]:
    """The candidate, three inputs, and its distance from float32 on each; skips what is refused."""
    cfg = Config.parse({"model": {"name": "pi0_mini"}, "attention": SDPA, **raw}).resolved(MACHINE)
    for knob in KNOBS:
        refusal = knob.check(cfg, MACHINE)
        if refusal is not None:
            assert refusal.outcome == "unavailable", refusal.reason
            pytest.skip(refusal.reason)
    policy = runtime.build_policy(cfg, torch.device("cuda"))
    workload = runtime.workload_of(cfg)
    inputs = [make_inputs(workload, policy.config, seed, "cuda") for seed in range(3)]
    with torch.no_grad():
        expected = [policy.sample_actions(item).cpu() for item in inputs]
    prepared = runtime.apply_knobs(policy, cfg)
    for _ in range(3):  # Inductor's own capture records at the second call
        prepared.call(inputs[0])
    results = [prepared.call(item) for item in inputs]
    found = [distance(r, e).rel_l2 for r, e in zip(results, expected, strict=True)]
    return prepared, inputs, [float("inf") if value is None else value for value in found]


@pytest.mark.parametrize("scope", ["stage", "call"])
def test_inductors_capture_follows_new_inputs(scope: str) -> None:
    raw = {"compile": {"mode": "reduce_overhead", "scope": scope}}
    prepared, inputs, distances = plain_and_candidate(raw)
    assert max(distances) < 0.02
    first = prepared.call(inputs[0])
    kept = first.clone()
    prepared.call(inputs[1])
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_tf32_is_between_float32_and_bfloat16() -> None:
    _, _, exact = plain_and_candidate({"precision": {"dtype": "float32"}})
    _, _, tf32 = plain_and_candidate({"precision": {"dtype": "float32", "tf32": True}})
    assert max(exact) < min(tf32)
    assert max(tf32) < 0.01


SWITCHES = BY_NAME["simplify"].options_type.model_fields
ONCE = {"state_once": True, "last_layer": True, "rope_tables": True}
OWN = {"denoise": "triton"}
SKINNY = {"backend": "triton_skinny"}
QKV = {"qkv": True, "gate_up": True, "vision_qkv": True}
EXPERT = {"fusion": {**QKV, "expert_layer": True}, "attention": {**SDPA, **OWN}, "gemm": SKINNY}
KERNELS = {
    "attention": dict.fromkeys(SDPA, "triton"), "elementwise": {"backend": "triton"},
    "gemm": SKINNY, "fusion": QKV,
}  # fmt: skip
COMPILED, CAPTURED = {"compile": {"mode": "default"}}, {"graph": {"mode": "manual"}}
RUNS = {"eager": {}, "captured": CAPTURED, "compiled": COMPILED, "both": {**COMPILED, **CAPTURED}}
PI05 = {"model": {"name": "pi05_mini"}}
FOLLOWING: dict[str, tuple[dict[str, Any], float]] = {
    f"expert layers {run}, {simplify}": ({**EXPERT, **RUNS[run], "simplify": switches}, 0.01)
    for run in RUNS
    for simplify, switches in {
        "none": {},
        "once": ONCE,
        "buffer": {"kv_buffer": True},
        "all": dict.fromkeys(SWITCHES, True),
    }.items()
}
FOLLOWING |= {
    f"pi05 {name}, simplify {on}": (
        {**PI05, **raw, "simplify": dict.fromkeys(SWITCHES, on), **CAPTURED}, 0.02
    )
    for name, raw in {"compiled": COMPILED, "own kernels": KERNELS}.items()
    for on in (False, True)
}  # fmt: skip
FOLLOWING |= {
    f"fp8 {run}": ({"blas": {"backend": "fp8"}, **RUNS[run]}, 0.1) for run in ("compiled", "both")
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_policies_follow_new_inputs(name: str) -> None:
    raw, limit = FOLLOWING[name]
    _, _, distances = plain_and_candidate(raw)
    assert max(distances) < limit


@pytest.mark.parametrize("rows", [1, 11, 532, 788])
@pytest.mark.parametrize(("k", "n", "bias"), [(2048, 2560, False), (1152, 4304, True)])
def test_fp8_layer_on_awkward_rows(rows: int, k: int, n: int, bias: bool) -> None:
    arch = fp8.device_arch(torch.device("cuda"))
    if arch.startswith("sm") and int(arch[2:]) < 89:
        pytest.skip(f"{arch} has no FP8")
    layer = Linear(k, n, bias, Ops()).requires_grad_(False).to("cuda", torch.bfloat16)
    x = torch.randn(1, rows, k, device="cuda", dtype=torch.bfloat16)
    expected = layer(x).float()
    fp8.become(layer, x.abs().amax().float(), fp8.fp8_dtype(arch))
    error = float((layer(x).float() - expected).norm() / expected.norm())
    assert 0.001 < error < 0.06


@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient", "math"])
@pytest.mark.parametrize("stage", ["vision", "prefill", "denoise"])
def test_a_backend_of_torch_computes_its_stage_or_refuses(stage: str, backend: str) -> None:
    raw = {"attention": {**SDPA, stage: backend}, "graph": {"mode": "manual"}}
    try:
        _, _, distances = plain_and_candidate(raw)
    except RefusedError as refusal:
        if backend == "math" or f"attention.{stage}={backend}" not in refusal.reason:
            raise
        pytest.skip(refusal.reason)
    assert max(distances) < 0.02
