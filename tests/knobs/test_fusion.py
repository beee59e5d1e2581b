"""Knob `fusion`: one GEMM instead of several, over the storage of the original weights."""

import pytest
import torch
from distances import distance
from mini_policies import config, plain_actions, plain_policy, prepare, sample_inputs
from safetensors.torch import load_file
from torch import Tensor

from openpi_opt.config import Config
from openpi_opt.pi0 import checkpoint
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.weights import init_random

ALL = {"qkv": True, "gate_up": True, "vision_qkv": True}
LAST = {"last_layer": True}


def shapes_multiplied(cfg: Config) -> list[tuple[int, ...]]:
    """Shapes of the weights of all products of one call, in order."""
    prepared = prepare(cfg)
    plain, shapes = prepared.policy.ops.linear, []

    def spied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        shapes.append(tuple(weight.shape))
        return plain(x, weight, bias)

    prepared.policy.ops.linear = spied
    prepared.call(sample_inputs(cfg))
    return shapes


def storages(policy: Pi0Policy) -> dict[int, int]:
    """Bytes by address of the distinct storages of all parameters."""
    used = (parameter.untyped_storage() for parameter in policy.parameters())
    return {storage.data_ptr(): storage.nbytes() for storage in used}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("switch", [*ALL, "all", "vision_mlp", "vision_patches", "residuals"])
def test_same_actions(switch, dtype):
    fusion = ALL if switch == "all" else {switch: True}
    cfg = config(precision={"dtype": dtype}, fusion=fusion)
    inputs = sample_inputs(cfg)
    plain = plain_actions(cfg, inputs, dtype)
    limit = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    assert distance(prepare(cfg).call(inputs), plain) < limit


def test_each_switch_replaces_its_products():
    plain = shapes_multiplied(config())
    towers, vision = 4 + 2 * 4, 4  # layers of the prefix and of two denoising steps; of SigLIP
    saved = {"qkv": 2 * towers, "gate_up": towers, "vision_qkv": 2 * vision, "vision_mlp": vision}
    for switch, fewer in saved.items():
        assert len(shapes_multiplied(config(fusion={switch: True}))) == len(plain) - fewer
    fused = shapes_multiplied(config(fusion=ALL))
    assert {(288, 96), (192, 128), (192, 96), (800, 128), (544, 96)} <= set(fused)


def test_of_the_last_layer_that_yields_keys_and_values_only_these_are_fused():
    fused = shapes_multiplied(config(fusion=ALL, simplify=LAST))
    assert fused.count((192, 128)) == 3
    assert fused.count((64, 128)) == 1
    assert fused.count((800, 128)) == 3


@pytest.mark.parametrize("simplify", [{}, LAST], ids=["", "last_layer"])
def test_the_original_weights_are_the_fused_ones(simplify):
    plain = plain_policy(config())
    fused = prepare(config(fusion=ALL, simplify=simplify)).policy
    assert sum(storages(fused).values()) == sum(storages(plain).values())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[name], tensor)


def test_other_weights_can_be_loaded_into_and_saved_from_a_fused_policy(tmp_path):
    cfg = config(fusion=ALL)
    inputs = sample_inputs(cfg)
    other, prepared = plain_policy(cfg), prepare(cfg)
    init_random(other, seed=1)
    expected = other.sample_actions(inputs)
    checkpoint.save(other, tmp_path / "other.safetensors")
    checkpoint.load(prepared.policy, tmp_path / "other.safetensors")
    assert distance(prepared.call(inputs), expected) < 1e-5
    checkpoint.save(prepared.policy, tmp_path / "saved.safetensors")
    saved, given = (load_file(tmp_path / f"{name}.safetensors") for name in ("saved", "other"))
    assert saved.keys() == given.keys()
    assert all(torch.equal(saved[name], given[name]) for name in given)
    prepared.policy.load_state_dict(plain_policy(cfg).state_dict())
    assert distance(prepared.call(inputs), plain_actions(cfg, inputs)) < 1e-5
