"""Names and sizes of the full model, random weights, precisions, and what the weights can show."""

import re
from collections.abc import Callable

import pytest
import torch

from openpi_opt.pi0.config import PI0, PI0_MINI, PI05, PI05_MINI
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.precision import cast
from openpi_opt.pi0.schedule import time_features, times
from openpi_opt.pi0.weights import build, init_random
from openpi_opt.pi0.workload import make_inputs

W = "paligemma_with_expert."
V = W + "paligemma.model.vision_tower.vision_model."
M = W + "paligemma.model.language_model."
E = W + "gemma_expert.model."


def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def pi0_shapes() -> dict[str, tuple[int, ...]]:
    """The table of an openpi file, written down independently of the code."""
    shapes: dict[str, tuple[int, ...]] = {
        V + "embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        V + "embeddings.patch_embedding.bias": (1152,),
        V + "embeddings.position_embedding.weight": (256, 1152),
        W + "paligemma.lm_head.weight": (257152, 2048),
        W + "gemma_expert.lm_head.weight": (257152, 1024),
        M + "norm.weight": (2048,),
        E + "norm.weight": (1024,),
    }
    shapes |= norm(V + "post_layernorm", 1152)
    shapes |= linear(W + "paligemma.model.multi_modal_projector.linear", 2048, 1152)
    for layer in range(27):
        prefix = f"{V}encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{prefix}self_attn.{part}", 1152, 1152)
        shapes |= linear(prefix + "mlp.fc1", 4304, 1152) | linear(prefix + "mlp.fc2", 1152, 4304)
        shapes |= norm(prefix + "layer_norm1", 1152) | norm(prefix + "layer_norm2", 1152)
    for tower, width, mlp in ((M, 2048, 16384), (E, 1024, 4096)):
        for layer in range(18):
            prefix = f"{tower}layers.{layer}."
            shapes |= {
                prefix + "self_attn.q_proj.weight": (2048, width),
                prefix + "self_attn.k_proj.weight": (256, width),
                prefix + "self_attn.v_proj.weight": (256, width),
                prefix + "self_attn.o_proj.weight": (width, 2048),
                prefix + "mlp.gate_proj.weight": (mlp, width),
                prefix + "mlp.up_proj.weight": (mlp, width),
                prefix + "mlp.down_proj.weight": (width, mlp),
                prefix + "input_layernorm.weight": (width,),
                prefix + "post_attention_layernorm.weight": (width,),
            }
    shapes |= linear("state_proj", 1024, 32) | linear("action_in_proj", 1024, 32)
    shapes |= linear("action_out_proj", 32, 1024)
    shapes |= linear("action_time_mlp_in", 1024, 2048) | linear("action_time_mlp_out", 1024, 1024)
    return shapes


def test_full_model_has_the_names_and_shapes_of_an_openpi_file():
    with torch.device("meta"):
        policy = Pi0Policy(PI0)
    shapes = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    assert shapes == pi0_shapes()
    assert len(shapes) == 777
    assert sum(tensor.numel() for tensor in policy.parameters()) == 3_501_372_176


def pi05_shapes() -> dict[str, tuple[int, ...]]:
    """What an openpi file of pi05 has instead."""
    shapes = pi0_shapes()
    norms = [E + "norm"] + [
        f"{E}layers.{layer}.{norm}_layernorm"
        for layer in range(18)
        for norm in ("input", "post_attention")
    ]
    gone = [f"{norm}.weight" for norm in norms]
    gone += [name for name in shapes if re.match("state_proj|action_time_mlp", name)]
    for name in gone:
        del shapes[name]
    for norm in norms:
        shapes |= linear(norm + ".dense", 3072, 1024)
    return shapes | linear("time_mlp_in", 1024, 1024) | linear("time_mlp_out", 1024, 1024)


def test_full_pi05_has_the_names_and_shapes_of_an_openpi_file():
    with torch.device("meta"):
        policy = Pi0Policy(PI05)
    shapes = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    assert shapes == pi05_shapes()
    assert len(shapes) == 812
    assert sum(tensor.numel() for tensor in policy.parameters()) == 3_616_757_520


def test_build_allocates_without_drawing_and_fills_the_tables():
    policy = build(PI0_MINI, "cpu", steps=3)
    assert not any(parameter.requires_grad for parameter in policy.parameters())
    assert {tensor.device.type for tensor in policy.state_dict().values()} == {"cpu"}
    assert torch.equal(policy.time_table, time_features(3, PI0_MINI.expert.width))


def test_times_are_accumulated_in_float32():
    expected = [1.0, 0.89999998, 0.79999995, 0.69999993, 0.59999990, 0.49999991, 0.39999992]
    expected += [0.29999992, 0.19999993, 0.09999993]
    assert times(10).tolist() == pytest.approx(expected, abs=5e-9)
    table = time_features(10, 1024)
    assert table.dtype == torch.float32
    # Longest period 4, shortest 0.004: sin(2 pi / 4) = 1 at t = 1.
    assert float(table[0, 511]) == pytest.approx(1.0)
    assert float(table[0, 0]) == pytest.approx(0.0, abs=1e-6)
    assert float(table[0, 512]) == pytest.approx(1.0)


def test_random_weights_depend_on_seed_and_name_only():
    first, again, other = (build(PI0_MINI, "cpu") for _ in range(3))
    init_random(first, seed=1)
    torch.manual_seed(99)
    backwards = list(again.named_parameters())[::-1]
    again.named_parameters = lambda: iter(backwards)
    init_random(again, seed=1)
    init_random(other, seed=2)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert not torch.equal(tensor, other.state_dict()[name]), name


def test_no_two_tensors_are_equal(either):
    """Equal layers would hide a mix-up."""
    sums = [float(tensor.double().abs().sum()) for tensor in either.state_dict().values()]
    assert len(set(sums)) == len(sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cast_keeps_what_openpi_keeps_in_float32(either, dtype):
    policy = either
    cast(policy, dtype)
    kept = re.compile(
        r"(state_proj|action_|time_mlp_).*|.*(patch|position)_embedding.*|.*input_layernorm.*"
        r"|.*post_attention_layernorm.*|.*(language_model|gemma_expert\.model)\.norm.*"
    )
    for name, tensor in policy.state_dict().items():
        expected = torch.float32 if kept.fullmatch(name) else dtype
        assert tensor.dtype == expected, name
        if name.startswith(W):
            assert torch.equal(tensor.float(), tensor.to(dtype).float()), name
    assert policy.time_table.dtype == policy.frequencies.dtype == torch.float32
    outer = policy.action_in_proj.weight
    assert not torch.equal(outer, outer.bfloat16().float())


def test_cast_refuses_other_dtypes(policy):
    with pytest.raises(ValueError, match=r"float64; allowed are float32, bfloat16, float16"):
        cast(policy, torch.float64)


def test_activations_stay_of_order_one(either, masked_workload):
    policy, sizes = either, {}

    def record(name: str) -> Callable[[object, object, object], None]:
        def hook(module: object, args: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            assert isinstance(tensor, torch.Tensor)
            sizes[name] = float(tensor.float().square().mean().sqrt())

        return hook

    for name, module in policy.named_modules():
        if re.fullmatch(r".*layers\.\d+|.*linear|.*norm|action_out_proj", name):
            module.register_forward_hook(record(name))
    policy.sample_actions(make_inputs(masked_workload, policy.config, 0, "cpu"))
    assert {name: size for name, size in sizes.items() if not 0.3 < size < 4.0} == {}


def test_modulations_vary_over_the_steps_as_over_the_channels():
    policy = build(PI05_MINI, "cpu")
    init_random(policy, seed=0)
    table = torch.stack([policy.modulations(features) for features in policy.time_table])
    scale, shift, gate = table.view(10, 9, 3, -1).unbind(2)
    for part, mean in ((scale, 0.0), (shift, 0.0), (gate, 1.2)):
        assert abs(float(part.mean()) - mean) < 0.1
        assert 0.2 < float(part.std(0).mean()) < 0.4
        assert 0.2 < float(part.mean(0).std()) < 0.5
