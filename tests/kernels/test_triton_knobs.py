"""The knobs that put Triton kernels into the policy."""

from __future__ import annotations

import pytest

from openpi_opt.config import Config
from openpi_opt.kernels import triton_activation, triton_norm, triton_rotary
from openpi_opt.knobs import BY_NAME
from openpi_opt.machine import Gpu, Machine, TorchBuild
from openpi_opt.pi0.config import PI0_MINI
from openpi_opt.pi0.policy import Pi0Policy

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
    assert policy.ops.layer_norm is triton_norm.layer_norm
    assert policy.ops.gelu_mul is triton_activation.gelu_mul
    assert policy.ops.rotary is triton_rotary.rotary
    assert policy.ops.linear is not before
    assert policy.ops.attention_denoise.__module__.endswith("triton_decode")
    assert policy.ops.attention_prefill.__module__.endswith("triton_attention")
