"""The knobs that put Triton kernels into the policy."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from openpi_opt.config import Config
from openpi_opt.kernels import triton_activation, triton_norm, triton_rotary
from openpi_opt.knobs import BY_NAME
from openpi_opt.machine import Gpu, Machine, TorchBuild
from openpi_opt.pi0 import weights
from openpi_opt.pi0.config import PI0_MINI
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.surgery.expert import FusedExpertLayer, FusedExpertTower

H100 = Gpu(0, "GPU-1", "H100", "nvidia", "sm90", 80_000, "580")
MACHINE = Machine((H100,), TorchBuild("2.13.0", "13.0", None), "x", 2, 1)
STAGES = ("vision", "prefill", "denoise")
TRITON = dict.fromkeys(STAGES, "triton")
CHOICES = {
    "attention": {"denoise": "triton"},
    "elementwise": {"backend": "triton"},
    "gemm": {"backend": "triton_skinny"},
}


def config(raw: dict, device: str = "cuda") -> Config:
    return Config.parse({"platform": {"device": device}, "model": {"name": "pi0_mini"}, **raw})


@pytest.mark.parametrize("name", CHOICES)
def test_triton_needs_a_gpu(name: str) -> None:
    knob = BY_NAME[name]
    assert knob.check(config({name: CHOICES[name]}), MACHINE) is None
    refusal = knob.check(config({name: CHOICES[name]}, "cpu"), MACHINE)
    assert refusal is not None
    assert refusal.outcome == "unavailable"
    assert "needs a GPU" in refusal.reason


def test_parameters_that_nothing_reads_do_not_make_another_configuration() -> None:
    same = [
        ({"launch_denoise": {"block_n": 32}}, {}),
        ({**TRITON, "launch_vision": {"fused": 1, "blocks": 2}}, TRITON),
        ({**TRITON, "launch_denoise": {"waves_per_eu": 2}}, TRITON),
    ]
    for left, right in same:
        assert config({"attention": left}).hash() == config({"attention": right}).hash()
    other = {**TRITON, "launch_denoise": {"block_n": 32}}
    assert config({"attention": other}).hash() != config({"attention": TRITON}).hash()
    assert config({"gemm": {"max_rows": 8}}).hash() == config({}).hash()


def test_labels_name_what_was_given() -> None:
    cfg = config({"attention": {**TRITON, "launch_denoise": {"block_n": 32}}})
    assert cfg.labels()["attention"] == "triton denoise.block_n=32"
    assert config({"gemm": {"backend": "triton_skinny"}}).labels()["gemm"] == "triton_skinny"


def test_the_kernels_are_put_into_the_operations() -> None:
    policy = Pi0Policy(PI0_MINI)
    before = policy.ops.linear
    cfg = config({**CHOICES, "attention": {**TRITON, "launch_prefill": {"block_m": 128}}})
    for name in CHOICES:
        BY_NAME[name].transform(policy, cfg)
    assert policy.ops.rms_norm is triton_norm.rms_norm
    assert policy.ops.adaptive_rms_norm is triton_norm.adaptive_rms_norm
    assert policy.ops.layer_norm is triton_norm.layer_norm
    assert policy.ops.gelu_mul is triton_activation.gelu_mul
    assert policy.ops.rotary is triton_rotary.rotary
    assert policy.ops.linear is not before
    assert policy.ops.attention_denoise.__module__.endswith("triton_decode")
    assert policy.ops.attention_prefill.__module__.endswith("triton_attention")


ALL_FUSED = dict.fromkeys(("qkv", "gate_up", "vision_qkv", "expert_layer"), True)
EXPERT: dict[str, Any] = {
    "fusion": ALL_FUSED,
    "attention": {"denoise": "triton"},
    "gemm": {"backend": "triton_skinny"},
}
CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "qkv apart": ({"fusion": {**ALL_FUSED, "qkv": False}}, "needs fusion.qkv"),
    "gate, up apart": ({"fusion": {**ALL_FUSED, "gate_up": False}}, "fusion.gate_up"),
    "float32": ({"precision": {"dtype": "float32"}}, "16-bit"),
    "another attention": ({"attention": {**TRITON, "denoise": "sdpa"}}, "attention.denoise=triton"),
    "another gemm": ({"gemm": {}}, "gemm=triton_skinny"),
    "fp8": (
        {"blas": {"backend": "fp8", "fp8": {"stages": ["vision", "denoise"]}}},
        "blas.fp8.stages",
    ),
    "aiter": ({"blas": {"backend": "aiter", "aiter": {"max_rows": 8}}}, "aiter"),
    "pi05": ({"model": {"name": "pi05_mini"}}, "simplify.time_mlp"),
}


def test_the_expert_layer_needs_a_gpu() -> None:
    check = BY_NAME["fusion"].check
    for device in ("cuda", "rocm"):
        assert check(config(EXPERT, device), MACHINE) is None
    refusal = check(config(EXPERT, "cpu"), MACHINE)
    assert refusal is not None
    assert refusal.outcome == "unavailable"
    assert check(config({"fusion": {"qkv": True}}, "cpu"), MACHINE) is None


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_the_expert_layer_overrules_no_other_option(name: str) -> None:
    raw, reason = CONTRADICTIONS[name]
    refusal = BY_NAME["fusion"].check(config({**EXPERT, **raw}), MACHINE)
    assert refusal is not None
    assert refusal.outcome == "invalid"
    assert re.search(reason, refusal.reason)


@pytest.mark.parametrize(
    "raw",
    [
        {"workload": {"horizon": 31, "batch_size": 3}},
        {"blas": {"backend": "fp8", "fp8": {"stages": ["vision", "prefill"]}}},
        {"model": {"name": "pi05_mini"}, "simplify": {"time_mlp": True}},
        {"precision": {"dtype": "float16"}},
        {"elementwise": {"backend": "triton"}},
    ],
)
def test_the_expert_layer_with_others(raw: dict[str, Any]) -> None:
    assert BY_NAME["fusion"].check(config({**EXPERT, **raw}), MACHINE) is None


def test_a_buffer_means_nothing_to_the_expert_layer() -> None:
    buffered = {**EXPERT, "simplify": {"kv_buffer": True}}
    assert config(buffered).hash() == config(EXPERT).hash()
    assert "kv_buffer" in BY_NAME["simplify"].notes(config(buffered))[0]
    plain = config({"simplify": {"kv_buffer": True}})
    assert plain.hash() != config({}).hash()
    assert BY_NAME["simplify"].notes(plain) == []


def test_the_label_names_the_expert_layer_beside_the_projections() -> None:
    partial = {**ALL_FUSED, "vision_qkv": False}
    labels = [config({"fusion": f}).labels()["fusion"] for f in (ALL_FUSED, partial)]
    assert labels == ["all+expert_layer", "qkv+gate_up+expert_layer"]


def test_the_expert_becomes_fused_layers_under_the_original_names() -> None:
    policy = weights.build(PI0_MINI, "cpu", steps=2)
    weights.init_random(policy, seed=0)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    BY_NAME["fusion"].transform(policy, config(EXPERT))
    assert isinstance(policy.expert, FusedExpertTower)
    assert all(isinstance(layer, FusedExpertLayer) for layer in policy.expert.layers)
    assert not any(isinstance(layer, FusedExpertLayer) for layer in policy.language.layers)
    after = policy.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
