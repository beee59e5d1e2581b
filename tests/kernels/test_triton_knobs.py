"""The knobs that put Triton kernels into the policy."""

from typing import Any

import torch

from openpi_opt.config import Config
from openpi_opt.kernels import triton_activation, triton_norm, triton_rotary
from openpi_opt.knobs import BY_NAME
from openpi_opt.pi0 import weights
from openpi_opt.pi0.config import PI0_MINI
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.surgery.expert import FusedExpertLayer, FusedExpertTower

STAGES = ("vision", "prefill", "denoise")
TRITON = dict.fromkeys(STAGES, "triton")
CHOICES = {
    "attention": {"denoise": "triton"},
    "elementwise": {"backend": "triton"},
    "gemm": {"backend": "triton_skinny"},
}


def config(raw: dict, device: str = "cuda") -> Config:
    return Config.parse({"platform": {"device": device}, "model": {"name": "pi0_mini"}, **raw})


def test_labels_name_what_was_given():
    cfg = config({"attention": {**TRITON, "launch_denoise": {"block_n": 32}}})
    assert cfg.labels()["attention"] == "triton denoise.block_n=32"
    assert config({"gemm": {"backend": "triton_skinny"}}).labels()["gemm"] == "triton_skinny"


def test_the_kernels_are_put_into_the_operations():
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


def test_the_label_names_the_expert_layer_beside_the_projections():
    partial = {**ALL_FUSED, "vision_qkv": False}
    three = {**ALL_FUSED, "expert_layer": False}
    given = ({}, {"qkv": True}, three, ALL_FUSED, partial)
    labels = [config({"fusion": f}).labels()["fusion"] for f in given]
    assert labels == ["none", "qkv", "all", "all+expert_layer", "qkv+gate_up+expert_layer"]


def test_the_expert_becomes_fused_layers_under_the_original_names():
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
