"""The Triton kernels on a GPU: bfloat16 on the model's shapes, compiled and captured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capturing import replays
from distances import attended, distance
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
from openpi_opt.pi0 import ops
from openpi_opt.pi0.gemma import Rope
from openpi_opt.pi0.ops import SEE_ALL, Segment, Visibility

pytestmark = pytest.mark.gpu

TOLERANCE = 6e-3  # bfloat16 inputs and output: half a unit in the last place is 2e-3
EPS = 1e-6


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


Case = tuple[Callable[..., Any], tuple[Any, ...], Callable[..., Any]]


def decode(horizon: int, launch: dict[str, int], cached: bool) -> Case:
    """The suffix of a denoising step; the mask is what `Pi0Policy.suffix_visibility` says."""
    tokens, past = horizon + 1, 788
    q = randn(1, tokens, 8, 256)
    k, v = randn(2, 1, past + tokens, 1, 256, seed=1)
    mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device="cuda")
    mask[0, past + 1 :] = False
    visibility = Visibility(None, (Segment(0, 1, past + 1), Segment(1, tokens, None)))
    if not cached:
        attend = triton_decode.attention(launch)

        def joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, visibility, 0.0625)

        return joined, (q, k, v), lambda q, k, v: attended(q, k, v, mask, 0.0625)
    attend_cached = triton_decode.cached_attention(launch)

    angles = randn(1, tokens, 128, seed=2, dtype=torch.float32)
    rope = Rope(angles.cos().bfloat16(), angles.sin().bfloat16())

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        caches = [(k[:, a:b], v[:, a:b]) for a, b in ((0, past), (past, None))]
        return attend_cached(q, *caches, rope, visibility, 0.0625)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = torch.cat((k[:, :past], ops.rotary(k[:, past:], *rope)), dim=1)
        return attended(ops.rotary(q, *rope), turned, v, mask, 0.0625)

    return apart, (q, k, v), expected


def flash(shape: tuple[int, ...], visible: int | None) -> Case:
    batch, tokens, heads, kv_heads, width = shape
    q, scale = randn(batch, tokens, heads, width), width**-0.5
    k, v = randn(2, batch, tokens, kv_heads, width, seed=1)
    mask, visibility = None, SEE_ALL
    if visible is not None:
        mask = (torch.arange(tokens, device="cuda") < visible)[None, None, None]
        visibility = Visibility(mask, None)
    attend = triton_attention.attention()
    return (
        lambda q, k, v: attend(q, k, v, visibility, scale),
        (q, k, v),
        lambda q, k, v: attended(q, k, v, mask, scale),
    )


def normed(rows: int, n: int, gated: bool) -> Case:
    x, weight = randn(1, rows, 1024), randn(n, 1024, seed=1) / 32

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        squares = x.float().square().sum(-1).view(1, -1)
        out: Tensor = triton_skinny_gemm.skinny_linear(x, weight, None, squares, EPS, gated)
        return out

    def expected(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.double()
        out = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() @ weight.double().T
        if not gated:
            return out
        gate, up = out.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up

    return ours, (x, weight), expected


def onward(rows: int, k: int, launch: dict[str, int], gain: bool) -> Case:
    x, weight = randn(1, rows, k), randn(1024, k, seed=1) * k**-0.5
    residual = randn(1, rows, 1024)
    gains = randn(1024, dtype=torch.float32) * 0.1 if gain else None
    code = encoded(LINEAR, launch)

    def ours(x: Tensor, weight: Tensor, residual: Tensor) -> list[Tensor]:
        out, scaled, squares = triton_skinny_gemm.skinny_linear_onward(
            x, weight, residual, None, gains, code
        )
        return [out, scaled if gain else out, squares.sum(0, keepdim=True)]

    def expected(x: Tensor, weight: Tensor, residual: Tensor) -> list[Tensor]:
        out = x.double() @ weight.double().T + residual.double()
        scaled = out if gains is None else out * (1 + gains.double())
        return [out, scaled, out.square().sum(-1)]

    return ours, (x, weight, residual), expected


def rms_norm() -> Case:
    x, gain = randn(1, 788, 2048), randn(2048, dtype=torch.float32)

    def expected(x: Tensor) -> Tensor:
        wide = x.double()
        rms = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return wide * rms * (1 + gain.double())

    return lambda x: triton_norm.rms_norm(x, gain, EPS), (x,), expected


def layer_norm() -> Case:
    x, (weight, bias) = randn(3, 256, 1152), randn(2, 1152)
    return (
        lambda x: triton_norm.layer_norm(x, weight, bias, EPS),
        (x,),
        lambda x: F.layer_norm(x.double(), (1152,), weight.double(), bias.double(), EPS),
    )


def gelu_mul() -> Case:
    def expected(x: Tensor) -> Tensor:
        gate, up = x.double().chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up

    return lambda x: triton_activation.gelu_mul(*x.chunk(2, -1)), (randn(1, 788, 32768),), expected


def rotary() -> Case:
    q, k = randn(1, 788, 8, 256), randn(1, 788, 1, 256)
    angle = randn(1, 788, 128, dtype=torch.float32) * 9
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()

    def expected(q: Tensor, k: Tensor) -> list[Tensor]:
        return [ops.rotary(t.double(), cos.double(), sin.double()) for t in (q, k)]

    return lambda q, k: triton_rotary.rotary_qk(q, k, cos, sin), (q, k), expected


CASES: dict[str, Callable[[], Case]] = {
    "decode": lambda: decode(10, {}, False),
    "decode, fused": lambda: decode(10, {"fused": 1}, False),
    "decode, cached": lambda: decode(10, {}, True),
    "decode, cached, fused": lambda: decode(50, {"fused": 1}, True),
    "decode, horizon 50": lambda: decode(50, {}, False),
    "prefill": lambda: flash((1, 788, 8, 1, 256), None),
    "prefill, masked": lambda: flash((1, 788, 8, 1, 256), 532),
    "vision": lambda: flash((3, 256, 16, 16, 72), None),
    "qkv": lambda: normed(11, 2560, False),
    "qkv, 51 rows": lambda: normed(51, 2560, False),
    "o": lambda: onward(11, 2048, {}, False),
    "o, two kernels": lambda: onward(11, 2048, {"fused": 0, "split_k": 8}, True),
    "down": lambda: onward(11, 4096, {}, False),
    "down, 51 rows, gain": lambda: onward(51, 4096, {}, True),
    "gate, up": lambda: normed(11, 8192, True),
    "gate, up, 51 rows": lambda: normed(51, 8192, True),
    "rms norm": rms_norm,
    "layer norm": layer_norm,
    "gelu_mul": gelu_mul,
    "rotary": rotary,
}


def listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str) -> None:
    """Twice the same; in one graph of Dynamo's, then one CUDA graph that follows new inputs."""
    ours, arguments, expected = CASES[name]()
    results = listed(ours(*arguments))
    for actual, again in zip(results, listed(ours(*arguments)), strict=True):
        assert torch.equal(actual, again), "two calls differ"
    # One after the other: a replay overwrites what the one before it wrote.
    for given, found in itertools.chain([(arguments, results)], replays(ours, arguments)):
        for actual, wanted in zip(listed(found), listed(expected(*given)), strict=True):
            assert actual.shape == wanted.shape
            assert distance(actual, wanted) < TOLERANCE


@pytest.mark.parametrize("name", ["decode, fused", "o", "down"])
def test_the_last_block_adds_the_same_each_time(name: str) -> None:
    """Which block comes last varies; the order of the sum must not."""
    ours, arguments, _ = CASES[name]()
    first = ours(*arguments)
    for _ in range(500):
        assert torch.equal(ours(*arguments), first)
