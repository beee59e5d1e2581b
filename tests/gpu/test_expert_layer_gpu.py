"""The fused expert layer on a GPU: full width in bfloat16, and whole policies as they are run."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capturing import replays
from distances import distance
from torch import Tensor

from openpi_opt.measure.profile import profile_call
from openpi_opt.pi0 import weights
from openpi_opt.pi0.config import PI0, PI0_MINI
from openpi_opt.pi0.gemma import Attending, GemmaLayer, KeysValues, Rope, rope_at
from openpi_opt.pi0.ops import Segment, Visibility, eager_attention
from openpi_opt.pi0.precision import cast
from openpi_opt.surgery import expert, fused
from openpi_opt.surgery.expert import FusedExpertLayer, fuse_expert_layers
from openpi_opt.surgery.folded import fold_norms
from openpi_opt.surgery.layers import gemma_layers

pytestmark = pytest.mark.gpu

STORED = 788
# One layer of the action expert at its full width, behind a prefix that is small but for its keys.
ONE_LAYER = dataclasses.replace(
    PI0_MINI,
    language=dataclasses.replace(PI0_MINI.language, depth=1, heads=8, head_dim=256),
    expert=dataclasses.replace(PI0.expert, depth=1),
)
# Rows of the call, and whether the first is the state token; folded norms.
CASES = {
    "state token": (11, True, False),
    "state run once": (10, False, True),
    "state token, horizon 50": (51, True, True),
    "the state alone": (1, False, False),
}


def one_layer(folded: bool) -> tuple[GemmaLayer, FusedExpertLayer, Tensor]:
    """The same bfloat16 weights twice, plain in float64 and fused; the rotary frequencies."""
    policy = weights.build(ONE_LAYER, "cuda")
    weights.init_random(policy, seed=0)
    if folded:
        fold_norms(policy)
    cast(policy, torch.bfloat16)
    plain = copy.deepcopy(policy.expert).double()
    fused.fuse_qkv(policy)
    fused.fuse_gate_up(policy)
    fuse_expert_layers(policy)
    layer = gemma_layers(policy.expert)[0]
    assert isinstance(layer, FusedExpertLayer)
    return gemma_layers(plain)[0], layer, policy.frequencies


def arguments(rows: int, state: bool, frequencies: Tensor) -> tuple[tuple[Tensor, ...], Attending]:
    """Tokens and what is stored, [1, S, W] and twice [1, N, 1, D]; how the tokens attend."""
    generator = torch.Generator("cuda").manual_seed(rows)
    shapes = [(1, rows, PI0.expert.width), *[(1, STORED, 1, PI0.expert.head_dim)] * 2]
    given = [torch.randn(*shape, generator=generator, device="cuda") for shape in shapes]
    positions = torch.arange(STORED, STORED + rows, device="cuda")[None]
    mask = torch.ones(1, 1, rows, STORED + rows, dtype=torch.bool, device="cuda")
    segments: tuple[Segment, ...] = (Segment(0, rows, None),)
    if state:
        mask[:, :, 0, STORED + 1 :] = False
        segments = (Segment(0, 1, STORED + 1), Segment(1, rows, None))
    rope = rope_at(positions, frequencies, torch.bfloat16)
    how = Attending(rope, Visibility(mask, segments), eager_attention)
    return tuple(t.bfloat16() for t in given), how


def calls(name: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], Callable[..., Tensor]]:
    """The fused layer, its tensors, and the plain layer in float64."""
    rows, state, folded = CASES[name]
    plain, layer, frequencies = one_layer(folded)
    given, how = arguments(rows, state, frequencies)

    def ours(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer(x, how, KeysValues(k, v))[0]

    def expected(*given: Tensor) -> Tensor:
        x, k, v = (tensor.double() for tensor in given)
        tables = Rope(how.rope.cos.double(), how.rope.sin.double())
        return plain(x, how._replace(rope=tables), KeysValues(k, v))[0]

    return ours, given, expected


@pytest.mark.parametrize("name", CASES)
def test_a_layer_compiled_and_captured(name: str) -> None:
    """As it is, in one graph of Dynamo's, and in a CUDA graph that follows new inputs."""
    ours, given, expected = calls(name)
    with torch.no_grad():
        out = ours(*given)
        assert distance(out, expected(*given)) < 1e-2
        # What the layer adds, without the residual that hides mistakes in it.
        added = expected(*given) - given[0].double()
        assert float((out.double() - given[0].double() - added).norm() / added.norm()) < 2e-2
        assert torch.equal(out, ours(*given))
    for static, captured in replays(ours, given):
        with torch.no_grad():
            assert distance(captured, expected(*static)) < 1e-2


def test_launches_of_a_layer_in_a_step() -> None:
    """Six; on AMD a second kernel adds the splits of the two products that have any."""
    _, layer, frequencies = one_layer(folded=False)
    (x, k, v), how = arguments(11, True, frequencies)
    gain = layer.constants.gain_in

    def call(stream: expert.Stream) -> None:
        with torch.no_grad():
            expert.step(layer, stream, how, KeysValues(k, v), layer.constants, gain)

    stream = expert.entering(layer.kernels, x, gain)
    for _ in range(3):
        call(stream)
    device: Any
    device, most = ("rocm", 8) if torch.version.hip else ("cuda", 6)
    assert profile_call(call, stream, device).kernels.total <= most
