"""Every backend that runs on a CPU against a reference in float64."""

import pytest
import torch
from distances import attended, distance
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from openpi_opt.errors import RefusedError
from openpi_opt.kernels.attention import backend, require_sdpa, sdpa, sdpa_by, segmented
from openpi_opt.pi0.ops import Segment, Visibility

# B, S, T, Hq, Hkv, D; awkward sizes on purpose
SHAPES = [(1, 11, 37, 4, 1, 32), (2, 5, 5, 3, 3, 24), (1, 1, 7, 8, 1, 16), (3, 50, 71, 2, 1, 8)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, keys, heads, kv_heads, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(batch, queries, heads, width, generator=generator)
    k = torch.randn(batch, keys, kv_heads, width, generator=generator)
    v = torch.randn(batch, keys, kv_heads, width, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def random_mask(shape: tuple[int, ...], per_query: bool) -> Tensor:
    batch, queries, keys = shape[:3]
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(batch, 1, queries if per_query else 1, keys, generator=generator) > 0.4
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("masked", ["none", "keys", "queries"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["eager", "sdpa", "math"])
def test_backend_against_reference(name, shape, masked, dtype):
    q, k, v = tensors(shape, dtype)
    mask = None if masked == "none" else random_mask(shape, masked == "queries")
    out = backend(name, "cpu")(q, k, v, Visibility(mask, None), 0.3)
    assert out.dtype == dtype
    assert distance(out, attended(q, k, v, mask, 0.3)) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES[:1])
def test_segments_are_the_mask_said_otherwise(shape):
    q, k, v = tensors(shape, torch.float32)
    queries, keys = shape[1:3]
    index = torch.tensor([0, 3, 5, 20])
    segments = (Segment(0, 1, 4), Segment(1, 6, index), Segment(6, queries, None))
    mask = torch.zeros(1, 1, queries, keys, dtype=torch.bool)
    mask[..., :1, :4] = True
    mask[..., 1:6, index] = True
    mask[..., 6:, :] = True
    out = segmented(sdpa)(q, k, v, Visibility(mask, segments), 0.3)
    assert distance(out, attended(q, k, v, mask, 0.3)) < 2e-6


def test_upper_left_causal_is_another_function():
    """Why no backend here passes is_causal: fewer queries than keys are aligned at the top."""
    q, k, v = tensors(SHAPES[0], torch.float32)
    mask = torch.ones(1, 1, *SHAPES[0][1:3], dtype=torch.bool)
    wrong = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    assert distance(wrong, attended(q, k, v, mask, 0.3)) > 0.5


def test_grouped_heads_that_no_backend_takes_are_refused():
    q, k, v = tensors((1, 3, 3, 4, 2, 8), torch.float32)
    with pytest.raises(ValueError, match="4 query heads on 2 key heads"):
        sdpa(q, k, v, 0.3, None)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"known are eager, sdpa, flash, cudnn, .*, triton"):
        backend("flash9", "cpu")


OPERATORS = {
    "flash": "aten::_scaled_dot_product_flash_attention_for_cpu",
    "math": "aten::_scaled_dot_product_attention_math",
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_chosen_backend_of_torch_runs_and_no_other(name, shape):
    q, k, v = tensors(shape, torch.float32)
    with torch.profiler.profile() as profile:
        out = sdpa_by(name)(q, k, v, 0.3, None)
    ran = {event.key for event in profile.key_averages()}
    assert OPERATORS[name] in ran
    assert not ran & (set(OPERATORS.values()) - {OPERATORS[name]})
    assert distance(out, attended(q, k, v, None, 0.3)) < 2e-6


@pytest.mark.parametrize("name", OPERATORS)
def test_compiled_it_is_still_the_chosen_one(name):
    """The choice is made while tracing, so it must be in force there."""
    q, k, v = tensors(SHAPES[0], torch.float32)
    seen: list[str] = []

    def kept(graph: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    backend_of = aot_autograd(fw_compiler=kept)
    with torch.no_grad():
        torch.compile(sdpa_by(name), fullgraph=True, dynamic=False, backend=backend_of)(
            q, k, v, 0.3, None
        )
    fused = [target for target in seen if "flash_attention" in target]
    assert len(fused) == (name == "flash")
    assert not [target for target in seen if "scaled_dot_product_attention." in target]


def test_flash_refuses_a_mask_instead_of_dropping_it():
    q, k, v = tensors(SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match="takes no mask"):
        backend("flash", "cpu")(q, k, v, Visibility(random_mask(SHAPES[0], False), None), 0.3)


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_a_backend_without_a_kernel_is_unavailable(name):
    like = torch.empty(0)
    with pytest.raises(RefusedError, match=f"attention.prefill={name}") as error:
        require_sdpa(name, "prefill", (1, 3, 2, 8), (1, 5, 1, 8), like)
    assert error.value.outcome == "unavailable"
    require_sdpa("flash", "prefill", (1, 3, 2, 8), (1, 5, 1, 8), like)
