"""Each own Triton kernel as the policy calls it: shapes of the full model, shipped parameters.

`CASES` are what `python -m openpi_opt.kernels` compiles and what the tests keep compiling; a new
kernel, or a new way to call one, gets its case here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openpi_opt.kernels import (
    triton_activation,
    triton_attention,
    triton_decode,
    triton_norm,
    triton_rotary,
    triton_skinny_gemm,
)
from openpi_opt.kernels.launch import LINEAR, encoded
from openpi_opt.kernels.triton_skinny_gemm import skinny_linear, skinny_linear_onward
from openpi_opt.pi0.config import PI0
from openpi_opt.pi0.gemma import EPS, Rope
from openpi_opt.pi0.ops import SEE_ALL, Padding, Segment, Visibility

MODULES = (
    triton_activation,
    triton_attention,
    triton_decode,
    triton_norm,
    triton_rotary,
    triton_skinny_gemm,
)

_HEADS, _HEAD_DIM = PI0.expert.heads, PI0.expert.head_dim
_WIDTH, _MLP, _QKV = PI0.expert.width, PI0.expert.mlp_width, (PI0.expert.heads + 2) * _HEAD_DIM
_PREFIX = 788  # three cameras and twenty tokens of the prompt
# The state token sees the prefix and itself, actions see all.
STATE = Visibility(None, (Segment(0, 1, _PREFIX + 1), Segment(1, 11, None)))


def decode() -> None:
    """Attention of a denoising step over joined keys."""
    q, k, v = empty(1, 11, 8, 256), empty(1, 799, 1, 256), empty(1, 799, 1, 256)
    triton_decode.attention()(q, k, v, STATE, 0.0625)


def decode_cached() -> None:
    """The same over the prefix's keys and the step's own, in one launch; openpi's 51 rows."""
    q, past, new = empty(1, 51, 8, 256), empty(1, _PREFIX, 1, 256), empty(1, 51, 1, 256)
    rope = Rope(empty(1, 51, 128), empty(1, 51, 128))
    attend = triton_decode.cached_attention({"fused": 1})
    attend(q, (past, past), (new, new), rope, SEE_ALL, 0.0625)


def prefill() -> None:
    """Attention of the prefix."""
    q, k = empty(1, _PREFIX, 8, 256), empty(1, _PREFIX, 1, 256)
    triton_attention.attention()(q, k, k, SEE_ALL, 0.0625)


def flexible() -> None:
    """Attention of prefix and step in a flexible layout: lengths are read on the device."""
    slots = 816  # three cameras, 48 slots of the prompt
    padding = Padding(empty(1, dtype=torch.int32), slots)
    q, k = empty(1, slots, 8, 256), empty(1, slots, 1, 256)
    everything = Visibility(None, (Segment(0, slots, None),), padding)
    triton_attention.attention()(q, k, k, everything, 0.0625)
    state = Visibility(None, (Segment(0, 1, slots + 1), Segment(1, 11, None)), padding)
    q, new = empty(1, 11, 8, 256), empty(1, 11, 1, 256)
    rope = Rope(empty(1, 11, 128), empty(1, 11, 128))
    triton_decode.cached_attention()(q, (k, k), (new, new), rope, state, 0.0625)


def vision() -> None:
    """Attention of three cameras."""
    q = empty(3, 256, 16, 72)
    triton_attention.attention()(q, q, q, SEE_ALL, 0.118)


def skinny() -> None:
    """A product of a denoising step with its splits added by the last block, or by a kernel."""
    wide, x = empty(1, 11, 2048), empty(1, 11, _WIDTH)
    for fused in (0, 1):
        launch = encoded(LINEAR, {"fused": fused, "split_k": 2})
        skinny_linear_onward(wide, empty(_WIDTH, 2048), x, launch=launch)


def expert_layer() -> None:
    """The products of a fused layer: of the state token alone, of 11, 21 and 51 rows.

    Of pi0, and of pi05 with gain, shift and gate of each step.
    """
    for rows in (1, 11, 21, 51):
        for adaptive in (False, True):
            _products(rows, adaptive)


def _products(rows: int, adaptive: bool) -> None:
    def vector(size: int) -> Tensor | None:
        return empty(size, dtype=torch.float32) if adaptive else None

    x, seen, hidden = (empty(1, rows, width) for width in (_WIDTH, _HEADS * _HEAD_DIM, _MLP))
    launched = {}
    for name, branch in (("out", seen), ("down", hidden)):
        weight = empty(_WIDTH, branch.shape[-1])
        launched[name] = skinny_linear_onward(branch, weight, x, vector(_WIDTH), vector(_WIDTH))
    sums = [launched["down"][2]]
    if not adaptive:  # the first layer gets whole sums of squares from torch
        sums.append(empty(1, rows, dtype=torch.float32))
    for squares in sums:
        skinny_linear(x, empty(_QKV, _WIDTH), vector(_QKV), squares, EPS)
    squares = launched["out"][2]
    skinny_linear(x, empty(2 * _MLP, _WIDTH), vector(2 * _MLP), squares, EPS, True)


def layer_attention() -> None:
    """The attention of a fused layer: of the state token alone, of 11 and of 51 rows."""
    attend = triton_decode.cached_attention(None)
    past = (empty(1, _PREFIX, 1, _HEAD_DIM), empty(1, _PREFIX, 1, _HEAD_DIM))
    table = empty(1, 51, _HEAD_DIM // 2)
    for rows in (1, 11, 51):
        rope = Rope(table[:, :rows], table[:, :rows])
        heads = empty(1, rows, _HEADS + 2, _HEAD_DIM)
        q, k, v = heads.split((_HEADS, 1, 1), dim=-2)
        attend(q, past, (k, v), rope, STATE, _HEAD_DIM**-0.5)


def elementwise() -> None:
    """Norms, activation and rotary embedding of the prefix and of vision; pi05's suffix norm."""
    x, gain = empty(1, _PREFIX, 2048), empty(2048, dtype=torch.float32)
    triton_norm.rms_norm(x, gain, EPS)
    scale, shift, _ = empty(3 * 1024, dtype=torch.float32).chunk(3)
    triton_norm.adaptive_rms_norm(empty(1, 10, 1024), scale, shift, EPS)
    triton_norm.layer_norm(empty(3, 256, 1152), empty(1152), empty(1152), EPS)
    triton_activation.gelu_mul(*empty(1, _PREFIX, 32768).chunk(2, -1))
    table = empty(1, _PREFIX, 128)
    triton_rotary.rotary_qk(empty(1, _PREFIX, 8, 256), empty(1, _PREFIX, 1, 256), table, table)


CASES: tuple[Callable[[], None], ...] = (
    decode,
    decode_cached,
    prefill,
    flexible,
    vision,
    skinny,
    expert_layer,
    layer_attention,
    elementwise,
)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor on the CPU, whose content nobody reads."""
    return torch.empty(*shape, dtype=dtype)
