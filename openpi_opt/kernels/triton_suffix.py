# mypy: disable-error-code="no-untyped-def"
"""The two ends of a denoising step in one launch each: actions to tokens, tokens to actions.

Around its layers a step of pi0 has eleven small kernels (time MLP, SiLU, state token, casts, norm,
projection, Euler step), 29 us of an H100 for 4 MB of weights. Here the first launch does
x_t -> silu(x_t W_in^T + t) W_out^T + b and puts the state's token before it; the second does
x_t + dt (norm(hidden) W^T + b). Products are TF32 where the caller allows it, sums are float32.
References: `embed_actions_reference`, `advance_actions_reference`.

Letters: B batch, H horizon, A action dim, E expert width, L tokens before the actions (0 or 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from openpi_opt.kernels.launch import Launch
from openpi_opt.kernels.triton_common import arch, can_follow, follow, padded
from openpi_opt.pi0 import ops


@triton.jit
def _embed(
    x_t, weight_in, time, weight_out, bias, state, out, rows, horizon, lead,
    stride_in, stride_out, width: tl.constexpr, actions: tl.constexpr, actions_padded: tl.constexpr,
    precision: tl.constexpr, launch: tl.constexpr,
):  # fmt: skip
    """One tile [block_m, block_n] of the action tokens, and of the state tokens before them."""
    block_m: tl.constexpr = launch.block_m
    block_n: tl.constexpr = launch.block_n
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)
    row = tl.program_id(1) * block_m + tl.arange(0, block_m)
    kept, live = column < width, row < rows
    follow(launch.dependent)
    action = tl.arange(0, actions_padded)
    inside = (action < actions)[None, :]
    x = tl.load(x_t + row[:, None] * actions + action[None, :], mask=live[:, None] & inside,
                other=0.0)  # fmt: skip
    acc = tl.zeros((block_m, block_n), tl.float32)
    for begin in range(0, width, launch.block_k):
        inner = begin + tl.arange(0, launch.block_k)
        held = inner < width
        w = tl.load(weight_in + inner[:, None] * stride_in + action[None, :],
                    mask=held[:, None] & inside, other=0.0)  # fmt: skip
        hidden = tl.dot(x, tl.trans(w), input_precision=precision)
        hidden += tl.load(time + inner, mask=held, other=0.0)[None, :]
        hidden = hidden / (1.0 + tl.exp(-hidden))
        w = tl.load(weight_out + column[:, None] * stride_out + inner[None, :],
                    mask=kept[:, None] & held[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(hidden, tl.trans(w), acc, input_precision=precision)
    acc += tl.load(bias + column, mask=kept, other=0.0)[None, :]
    token = row // horizon * (horizon + lead) + lead + row % horizon
    keep = live[:, None] & kept[None, :]
    tl.store(
        out + token[:, None] * width + column[None, :], acc.to(out.dtype.element_ty), mask=keep
    )
    if state is not None:
        # The block of an element's first action writes its state token, too.
        first = (live & (row % horizon == 0))[:, None] & kept[None, :]
        value = tl.load(state + (row // horizon)[:, None] * width + column[None, :], mask=first,
                        other=0.0)  # fmt: skip
        place = (token - 1)[:, None] * width + column[None, :]
        tl.store(out + place, value.to(out.dtype.element_ty), mask=first)


@triton.jit
def _advance(
    hidden, gain, shift, weight, bias, x_t, out, horizon, stride_b, stride_s, stride_weight,
    dt, eps, width: tl.constexpr, actions: tl.constexpr, block: tl.constexpr,
    actions_padded: tl.constexpr, launch: tl.constexpr,
):  # fmt: skip
    """One action: its token is normed, projected and added to x_t."""
    row = tl.program_id(0)
    action, column = tl.arange(0, actions_padded), tl.arange(0, block)
    keep, inside = column < width, action < actions
    # Nothing before this kernel writes weights: they are on their way during the wait.
    w = tl.load(weight + action[:, None] * stride_weight + column[None, :],
                mask=inside[:, None] & keep[None, :], other=0.0)  # fmt: skip
    follow(launch.dependent)
    source = hidden + row // horizon * stride_b + row % horizon * stride_s
    x = tl.load(source + column, mask=keep, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    if gain is not None:
        x *= 1.0 + tl.load(gain + column, mask=keep, other=0.0).to(tl.float32)
    if shift is not None:
        x += tl.load(shift + column, mask=keep, other=0.0).to(tl.float32)
    velocity = tl.sum(w * x[None, :], 1) + tl.load(bias + action, mask=inside, other=0.0)
    place = row * actions + action
    tl.store(out + place, tl.load(x_t + place, mask=inside, other=0.0) + dt * velocity, mask=inside)


def _dependent(x: Tensor) -> int:
    return 1 if can_follow(arch(x)) else 0


@torch.library.custom_op("openpi_opt::triton_embed_actions", mutates_args=())
def embed_actions(
    x_t: Tensor,
    weight_in: Tensor,
    time: Tensor,
    weight_out: Tensor,
    bias: Tensor,
    state: Tensor | None,
    dtype: torch.dtype,
    tf32: bool,
) -> Tensor:
    """x_t [B, H, A] -> tokens [B, L + H, E] of `dtype`.

    weight_in [E, A], time [E] (what a step adds before SiLU), weight_out [E, E], bias [E] and the
    state tokens [B, 1, E] (None: there are none) are float32.
    """
    (batch, horizon, actions), width = x_t.shape, weight_out.shape[0]
    x_t, lead, rows = x_t.contiguous(), int(state is not None), batch * horizon
    tokens = None if state is None else state.contiguous()
    out = torch.empty(batch, horizon + lead, width, dtype=dtype, device=x_t.device)
    launch = Launch(min(64, padded(rows)), 16, 128, num_warps=4, num_stages=3,
                    dependent=_dependent(x_t))  # fmt: skip
    grid = (triton.cdiv(width, launch.block_n), triton.cdiv(rows, launch.block_m))
    _embed[grid](
        x_t, weight_in, time, weight_out, bias, tokens, out, rows, horizon, lead,
        weight_in.stride(0), weight_out.stride(0), width=width, actions=actions,
        actions_padded=padded(actions), precision="tf32" if tf32 else "ieee", launch=launch,
        **launch.options(),
    )  # fmt: skip
    return out


@torch.library.custom_op("openpi_opt::triton_advance_actions", mutates_args=())
def advance_actions(
    x_t: Tensor,
    hidden: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dt: float,
    eps: float,
) -> Tensor:
    """x_t + dt * (norm(hidden) @ weight^T + bias), [B, H, A] float32.

    hidden [B, S, E], of which the last H tokens are the actions; gain (1 + gain is the norm's) and
    shift [E] or None; weight [A, E] and bias [A] float32.
    """
    (batch, horizon, actions), width = x_t.shape, hidden.shape[-1]
    x_t, tokens = x_t.contiguous(), hidden[:, -horizon:]
    if tokens.stride(-1) != 1:
        tokens = tokens.contiguous()
    out = torch.empty_like(x_t)
    launch = Launch(num_warps=8, dependent=_dependent(x_t))
    _advance[(batch * horizon,)](
        tokens, gain, shift, weight, bias, x_t, out, horizon, tokens.stride(0), tokens.stride(1),
        weight.stride(0), dt, eps, width=width, actions=actions,
        block=triton.next_power_of_2(width), actions_padded=padded(actions), launch=launch,
        **launch.options(),
    )  # fmt: skip
    return out


@embed_actions.register_fake
def _(
    x_t: Tensor,
    weight_in: Tensor,
    time: Tensor,
    weight_out: Tensor,
    bias: Tensor,
    state: Tensor | None,
    dtype: torch.dtype,
    tf32: bool,
) -> Tensor:
    tokens = x_t.shape[1] + (state is not None)
    return x_t.new_empty(x_t.shape[0], tokens, weight_out.shape[0], dtype=dtype)


@advance_actions.register_fake
def _(
    x_t: Tensor,
    hidden: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dt: float,
    eps: float,
) -> Tensor:
    return x_t.new_empty(x_t.shape)


def embed_actions_reference(
    x_t: Tensor,
    weight_in: Tensor,
    time: Tensor,
    weight_out: Tensor,
    bias: Tensor,
    state: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`embed_actions` in plain PyTorch."""
    tokens = F.linear(F.silu(F.linear(x_t, weight_in, time)), weight_out, bias)
    return (tokens if state is None else torch.cat((state, tokens), dim=1)).to(dtype)


def advance_actions_reference(
    x_t: Tensor,
    hidden: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dt: float,
    eps: float,
) -> Tensor:
    """`advance_actions` in plain PyTorch, the norm not rounded."""
    wide = hidden[:, -x_t.shape[1] :].to(x_t.dtype)
    normed = ops.rms_norm(wide, gain, eps)
    return x_t + dt * F.linear(normed if shift is None else normed + shift, weight, bias)
