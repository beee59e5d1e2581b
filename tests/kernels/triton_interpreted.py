"""The Triton kernels in interpreter mode, against float64 references, on awkward shapes.

Not collected by name: `test_triton_interpreter.py` runs it in a process with TRITON_INTERPRET=1,
which must be set before Triton is imported. float16 and float32 only: the interpreter multiplies
bfloat16 tiles as if they were integers (Triton 3.6 to 3.7), so bfloat16 is left to the GPU tests.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from distances import attended
from torch import Tensor

from openpi_opt.kernels import (
    launch,
    triton_activation,
    triton_attention,
    triton_decode,
    triton_norm,
    triton_rotary,
    triton_skinny_gemm,
)
from openpi_opt.kernels.triton_skinny_gemm import (
    skinny_linear,
    skinny_linear_onward,
    skinny_linear_onward_reference,
    skinny_linear_reference,
)
from openpi_opt.pi0 import ops
from openpi_opt.pi0.gemma import Rope
from openpi_opt.pi0.ops import Padding, Segment, Visibility

HALF, FULL = torch.float16, torch.float32
# A rounding of the result; products of float16 weights with the float16 probabilities add another.
TOLERANCE = {HALF: 1.5e-3, FULL: 2e-6}
EPS = 1e-6


def randn(*shape: int, dtype: torch.dtype = FULL, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    """Relative L2 error, whole and in the worst row (a wrong row must not hide among good ones)."""
    assert actual.shape == expected.shape
    assert bool(actual.isfinite().all())
    rows = (actual.double() - expected).flatten(0, -2).norm(dim=-1)
    worst = rows / expected.flatten(0, -2).norm(dim=-1).clamp_min(1e-9)
    limit = TOLERANCE[actual.dtype]
    assert float(rows.norm() / expected.norm()) < limit
    assert float(worst.max()) < 4 * limit, f"row {int(worst.argmax())} of {len(worst)}"


# B, S, T, Hq, Hkv, D
SHAPES = [(1, 11, 37, 8, 1, 32), (2, 7, 70, 4, 2, 24), (1, 1, 1, 2, 1, 16), (1, 3, 130, 2, 1, 72)]


def qkv(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, queries, keys, heads, kv_heads, width = shape
    k, v = randn(2, batch, keys, kv_heads, width, dtype=dtype, seed=1)
    return randn(batch, queries, heads, width, dtype=dtype), k, v


def mask_of(kind: str, shape: tuple[int, ...]) -> Tensor | None:
    batch, queries, keys = shape[:3]
    if kind == "none":
        return None
    rows = queries if kind == "queries" else 1
    mask = torch.rand(batch, 1, rows, keys, generator=torch.Generator().manual_seed(3)) > 0.5
    if kind == "one":
        mask[:] = False
    mask[..., keys // 2] = True
    return mask


BACKENDS = {
    "flash": triton_attention.attention({"block_m": 16, "block_n": 32}),
    "decode": triton_decode.attention({"block_m": 32, "block_n": 32, "blocks": 1}),
    "decode, two blocks, fused": triton_decode.attention(
        {"block_m": 64, "block_n": 16, "blocks": 2, "fused": 1}
    ),
}


KINDS = ("none", "keys", "queries", "one")
# Each shape with two kinds of masks, each kind with two shapes: the interpreter is slow.
MASKED = [(s, KINDS[(i + j) % 4]) for i, s in enumerate(SHAPES) for j in (0, 1)]


@pytest.mark.parametrize(("shape", "kind"), MASKED)
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_with_any_mask(name: str, shape: tuple[int, ...], kind: str) -> None:
    mask = mask_of(kind, shape)
    q, k, v = qkv(shape, HALF if kind == "keys" else FULL)
    out = BACKENDS[name](q, k, v, Visibility(mask, None), 0.3)
    close(out, attended(q, k, v, mask, 0.3))


@pytest.mark.parametrize("name", BACKENDS)
def test_state_token_sees_fewer_keys_than_the_actions(name: str) -> None:
    q, k, v = qkv((1, 11, 37, 8, 1, 32), FULL)
    mask = torch.ones(1, 1, 11, 37, dtype=torch.bool)
    mask[:, :, 0, 27:] = False
    segments = (Segment(0, 1, 27), Segment(1, 11, None))
    out = BACKENDS[name](q, k, v, Visibility(None, segments), 0.25)
    close(out, attended(q, k, v, mask, 0.25))


def padded(shape: tuple[int, ...], lengths: list[int], stop: int) -> tuple[Padding, Tensor]:
    """Padding from each length on, and the mask that says the same."""
    keys = torch.arange(shape[2])
    start = torch.tensor(lengths, dtype=torch.int32)
    seen = (keys < start[:, None]) | (keys >= stop)
    return Padding(start, stop), seen[:, None, None].expand(-1, 1, shape[1], -1)


@pytest.mark.parametrize("stop", [37, 30])
@pytest.mark.parametrize("name", BACKENDS)
def test_padding_is_where_the_device_says(name: str, stop: int) -> None:
    """Another length for each element, before keys that are seen again, or at the end."""
    shape = (3, 11, 37, 4, 2, 24)
    q, k, v = qkv(shape, FULL)
    padding, mask = padded(shape, [1, 16, 29], stop)
    everything = (Segment(0, 11, None),)
    out = BACKENDS[name](q, k, v, Visibility(None, everything, padding), 0.25)
    close(out, attended(q, k, v, mask, 0.25))
    mask = mask.clone()
    mask[:, :, 0, 34:] = False
    state = (Segment(0, 1, 34), Segment(1, 11, None))
    out = BACKENDS[name](q, k, v, Visibility(None, state, padding), 0.25)
    close(out, attended(q, k, v, mask, 0.25))


@pytest.mark.parametrize("name", BACKENDS)
def test_leading_keys_and_keys_by_index(name: str) -> None:
    q, k, v = qkv((1, 5, 37, 2, 1, 16), FULL)
    mask = (torch.arange(37) < 20)[None, None, None]
    out = BACKENDS[name](q, k, v, Visibility(mask, (Segment(0, 5, 20),)), 0.25)
    close(out, attended(q, k, v, mask, 0.25))
    mask = mask_of("keys", (1, 5, 37))
    assert mask is not None
    index = mask[0, 0, 0].nonzero()[:, 0]
    out = BACKENDS[name](q, k, v, Visibility(mask, (Segment(0, 5, index),)), 0.25)
    close(out, attended(q, k, v, mask, 0.25))
    with pytest.raises(ValueError, match="need the mask"):
        BACKENDS[name](q, k, v, Visibility(None, (Segment(0, 5, index),)), 0.25)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_query_that_sees_nothing_is_finite(name: str) -> None:
    q, k, v = qkv((1, 5, 37, 2, 1, 16), FULL)
    mask = torch.ones(1, 1, 5, 37, dtype=torch.bool)
    mask[:, :, 2] = False
    out = BACKENDS[name](q, k, v, Visibility(mask, None), 0.25)
    assert float(out[:, 2].abs().max()) == 0
    others = [0, 1, 3, 4]
    close(out[:, others], attended(q[:, others], k, v, None, 0.25))


@pytest.mark.parametrize("name", BACKENDS)
def test_one_graph_under_compile(name: str) -> None:
    q, k, v = qkv((1, 3, 20, 2, 1, 16), FULL)
    visibility = Visibility(None, (Segment(0, 1, 18), Segment(1, 3, None)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return BACKENDS[name](q, k, v, visibility, 0.25)

    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


@pytest.mark.parametrize("name", BACKENDS)
def test_strided_views_and_large_logits(name: str) -> None:
    fused = randn(2, 9, (4 + 1 + 1) * 16, seed=5) * 20
    q = fused[..., :64].view(2, 9, 4, 16)
    k, v = fused[..., 64:80].view(2, 9, 1, 16), fused[..., 80:].view(2, 9, 1, 16)
    close(BACKENDS[name](q, k, v, ops.SEE_ALL, 1.0), attended(q, k, v, None, 1.0))


@pytest.mark.parametrize(
    ("past", "masked", "fused"),
    [(1, False, 0), (1, True, 1), (26, False, 1), (26, True, 0), (32, False, 1), (32, True, 0)],
)
def test_cached_and_new_keys_apart(past: int, masked: bool, fused: int) -> None:
    shape = (2, 11, past + 11, 4, 1, 24)
    q, k, v = qkv(shape, FULL)
    mask = torch.ones(1, 1, 11, past + 11, dtype=torch.bool)
    mask[:, :, 0, past + 1 :] = False
    segments = None if masked else (Segment(0, 1, past + 1), Segment(1, 11, None))
    padding = None
    if not masked:
        padding, seen = padded((2, 11, past + 11), [1, past // 2 + 1], past)
        mask = mask & seen
    attend = triton_decode.cached_attention({"block_n": 16, "blocks": 2, "fused": fused})
    caches = [(k[:, a:b], v[:, a:b]) for a, b in ((0, past), (past, None))]
    angles = randn(2, 11, 12, seed=9)
    rope = Rope(angles.cos(), angles.sin())
    out = attend(q, *caches, rope, Visibility(mask if masked else None, segments, padding), 0.2)
    turned = torch.cat((k[:, :past], ops.rotary(k[:, past:], *rope)), dim=1)
    close(out, attended(ops.rotary(q, *rope), turned, v, mask, 0.2))


def test_fused_and_separate_addition_of_splits_agree_and_repeat() -> None:
    q, k, v = qkv((1, 11, 99, 8, 1, 32), FULL)
    results = [
        triton_decode.attention({"block_m": 32, "block_n": 16, "fused": fused})(
            q, k, v, ops.SEE_ALL, 0.2
        )
        for fused in (0, 1, 1)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(results[1], results[2])


NORM_SHAPES = [(1, 1, 5), (2, 7, 48), (1, 11, 1152), (51, 33)]


@pytest.mark.parametrize(("shape", "dtype"), list(product(NORM_SHAPES, [HALF, FULL])))
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = randn(*shape, dtype=dtype)
    weight, bias = randn(2, shape[-1])
    wide = x.double()
    for gain in (weight, None):
        scale = 1 if gain is None else 1 + gain.double()
        expected = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * scale
        close(triton_norm.rms_norm(x, gain, EPS), expected)
    modulation = randn(3 * shape[-1])
    scale, shift, _ = modulation.chunk(3)
    adaptive = triton_norm.adaptive_rms_norm(x, scale, shift, EPS)
    close(adaptive, ops.adaptive_rms_norm(wide, scale.double(), shift.double(), EPS).double())
    for gain, shift in ((weight, bias), (None, None)):
        wides = [None if t is None else t.double() for t in (gain, shift)]
        expected = torch.nn.functional.layer_norm(wide, shape[-1:], *wides, EPS)
        close(triton_norm.layer_norm(x, gain, shift, EPS), expected)


@pytest.mark.parametrize(
    ("shape", "dtype"), list(product([(1, 3), (2, 7, 100), (3, 1030)], [HALF, FULL]))
)
def test_activations(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = randn(2, *shape, dtype=dtype) * 3
    gelu = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    close(triton_activation.gelu(gate), gelu)
    close(triton_activation.gelu_mul(gate, up), gelu * up.double())
    halves = torch.cat((gate, up), -1).chunk(2, -1)
    close(triton_activation.gelu_mul(*halves), gelu * up.double())


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # exp: x / inf is 0
def test_activations_far_out_are_finite() -> None:
    x = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4])
    assert triton_activation.gelu(x).tolist() == [0.0, 0.0, 0.0, 30.0, 1e4]


@pytest.mark.parametrize(
    ("shape", "shared", "dtype"),
    [
        ((1, 11, 8, 1, 32), True, HALF),
        ((2, 7, 4, 2, 24), True, FULL),
        ((2, 7, 4, 2, 24), False, HALF),
        ((1, 1, 1, 1, 2), False, FULL),
    ],
)
def test_rotary(shape: tuple[int, ...], shared: bool, dtype: torch.dtype) -> None:
    batch, tokens, heads, kv_heads, width = shape
    q = randn(batch, tokens, heads, width, dtype=dtype)
    k = randn(batch, tokens, kv_heads, width, dtype=dtype, seed=1)
    angle = randn(1 if shared else batch, tokens, width // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    wide = [ops.rotary(t.double(), cos.double(), sin.double()) for t in (q, k)]
    close(triton_rotary.rotary(q, cos, sin), wide[0])
    for mine, expected in zip(triton_rotary.rotary_qk(q, k, cos, sin), wide, strict=True):
        close(mine, expected)


LAUNCHES = {
    "rule": {},
    "split, fused": {"block_n": 16, "block_k": 16, "split_k": 4, "fused": 1},
    "split, two kernels": {"block_n": 16, "block_k": 16, "split_k": 4, "fused": 0},
    "no split": {"block_n": 32, "block_k": 32, "split_k": 1},
}


def encoded(overrides: dict[str, int]) -> list[int]:
    return launch.encoded(launch.LINEAR, overrides)


# Launches differ with all inputs and with none; what each input does is seen with one launch.
NONE_AND_ALL = [(FULL, 0), (HALF, -1)]


@pytest.mark.parametrize("shape", [(1, 40, 72), (7, 33, 64), (11, 64, 128), (51, 17, 100)])
@pytest.mark.parametrize("name", LAUNCHES)
def test_skinny_linear(name: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    given = [set[str](), {"bias"}, {"squares", "eps"}, {"bias", "squares", "eps"}]
    all_of_them = [(FULL, i) for i in range(4)] + [(HALF, -1)]
    for gated in (False, True):
        for dtype, which in all_of_them if name == "rule" else NONE_AND_ALL:
            x = randn(1, m, k, dtype=dtype)
            weight = randn(2 * n if gated else n, k, dtype=dtype) * k**-0.5
            squares = x.float().square().view(m, 4, -1).sum(-1).T.contiguous()
            every = {"bias": randn(len(weight)), "squares": squares, "eps": EPS}
            some: dict[str, Any] = {key: every[key] for key in given[which]}
            out = skinny_linear(x, weight, **some, gated=gated, launch=encoded(LAUNCHES[name]))
            wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in some.items()}
            args = x.double(), weight.double()
            close(out, skinny_linear_reference(*args, **wide, gated=gated))


@pytest.mark.parametrize("shape", [(1, 40, 72), (7, 33, 64), (11, 140, 128), (51, 17, 100)])
@pytest.mark.parametrize("name", LAUNCHES)
def test_skinny_linear_onward(name: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    given = [(), ("factor",), ("factor", "gain")]
    all_of_them = [(FULL, i) for i in range(3)] + [(HALF, -1)]
    for dtype, which in all_of_them if name == "rule" else NONE_AND_ALL:
        x, weight = randn(1, m, k, dtype=dtype), randn(n, k, dtype=dtype) * k**-0.5
        residual = randn(1, m, n, dtype=dtype)
        every = {"factor": randn(n, seed=1), "gain": randn(n, seed=2) * 0.1}
        some = {key: every[key] for key in given[which]}
        code = encoded(LAUNCHES[name])
        out, scaled, squares = skinny_linear_onward(x, weight, residual, **some, launch=code)
        wide = {key: tensor.double() for key, tensor in some.items()}
        args = x.double(), weight.double(), residual.double()
        expected = skinny_linear_onward_reference(*args, **wide)
        close(out, expected[0])
        assert scaled.shape == expected[1].shape
        if "gain" in some:
            close(scaled, expected[1])
        close(squares.sum(0, keepdim=True), out.double().square().sum(-1).view(1, -1))


def test_linear_for_few_rows_only() -> None:
    linear = triton_skinny_gemm.linear(max_rows=8)
    weight, bias = randn(24, 40), randn(24)
    for rows in (1, 8, 9):
        x = randn(1, rows, 40)
        expected = torch.nn.functional.linear(x, weight, bias)
        torch.testing.assert_close(linear(x, weight, bias), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="at most 64"):
        skinny_linear(randn(65, 40), weight)
    with pytest.raises(ValueError, match="not among"):
        triton_skinny_gemm.linear(8, {"block_q": 1})


OPERATORS = {
    "rms_norm": lambda: (triton_norm.rms_norm, (randn(3, 20), randn(20), EPS)),
    "adaptive_rms_norm": lambda: (
        triton_norm.adaptive_rms_norm,
        (randn(3, 20), randn(20), randn(20), EPS),
    ),
    "layer_norm": lambda: (triton_norm.layer_norm, (randn(3, 20), randn(20), randn(20), EPS)),
    "gelu_mul": lambda: (triton_activation.gelu_mul, tuple(randn(2, 3, 20))),
    "rotary_qk": lambda: (
        triton_rotary.rotary_qk,
        (randn(1, 3, 2, 8), randn(1, 3, 1, 8), randn(1, 3, 4), randn(1, 3, 4)),
    ),
    "flash": lambda: (
        triton_attention.flash_attention,
        (*qkv(SHAPES[0], FULL), 1, 9, 37, None, 0.3, []),
    ),
    "decode": lambda: (
        triton_decode.decode_attention,
        (*qkv(SHAPES[0], FULL), None, None, None, None, 1, 9, 37, None, 0.3, []),
    ),
    "skinny": lambda: (
        skinny_linear,
        (randn(3, 20), randn(24, 20), randn(24), randn(2, 3).square(), EPS, False, []),
    ),
    "onward": lambda: (
        skinny_linear_onward,
        (randn(3, 20), randn(24, 20), randn(3, 24), None, randn(24), []),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_as_registered(name: str) -> None:
    """Schema, fake shapes and strides, and torch.compile agree with what is computed."""
    operator, arguments = OPERATORS[name]()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=checks)
    torch._dynamo.reset()  # the operators share the code that Dynamo counts compilations of
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), operator(*arguments))


def test_what_is_arranged_otherwise_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks dealt to dies, values in one tile, four heads a block: the same results."""
    for module in (triton_activation, triton_attention, triton_rotary):
        monkeypatch.setattr(module, "arch", lambda tensor: "gfx942")
    for shape in ((2, 70, 70, 3, 3, 72), (1, 200, 90, 5, 1, 24)):
        q, k, v = qkv(shape, FULL)
        out = triton_attention.attention({"dies": 8, "block_m": 16})(
            q, k, v, Visibility(None, None), 0.3
        )
        close(out, attended(q, k, v, None, 0.3))
    for heads, kv_heads in ((8, 1), (3, 5)):
        q, k = randn(2, 3, heads, 24), randn(2, 3, kv_heads, 24)
        angles = randn(2, 3, 12)
        found = triton_rotary.rotary_qk(q, k, angles.cos(), angles.sin())
        for x, out in zip((q, k), found, strict=True):
            close(out, ops.rotary(x.double(), angles.cos().double(), angles.sin().double()))
    gate, up = randn(3, 2100), randn(3, 2100, seed=1)
    close(triton_activation.gelu_mul(gate, up), ops.gelu_mul(gate.double(), up.double()))
