"""Linear layers by cuBLASLt, with the algorithm that was fastest on this GPU for their shape.

cuBLASLt's heuristic orders the algorithms (tiles, clusters, splits of the sum) by a model of the
GPU; the best of a shape is often not the first. So the first call of a shape times all that the
heuristic offers, with weights from memory and activations in the cache, as in the policy. Torch has
this on AMD (TunableOp) and offers a single solution on NVIDIA, which is why the library is called
here itself. Bias, GELU and residual belong to the epilogue. NVIDIA only; AMD: `blas.tunableop`.

Source of the interface: cuBLAS 13 documentation, "Using the cuBLASLt API"; numbers are those of
`cublasLt.h` and `library_types.h`. Reference: `searched_linear_reference`.

Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from openpi_opt.kernels.operators import of_product, operator
from openpi_opt.kernels.triton_common import as_rows
from openpi_opt.pi0 import ops

_TYPES = {torch.bfloat16: 14, torch.float16: 2}
_FLOAT = 0
_COMPUTE_FLOAT = 68
_TRANSPOSE_A, _EPILOGUE, _BIAS = 3, 7, 8  # attributes of a product
_MAX_WORKSPACE = 1  # attribute of a preference
_EPILOGUES = {(False, False): 1, (True, False): 4, (False, True): 32, (True, True): 36}
WORKSPACE = 32 << 20
CANDIDATES = 256
_FLUSH_BYTES = 128 << 20
GAIN = 0.98
"""Another algorithm than the heuristic's first is taken if it needs less than this part of it."""


class _Found(ctypes.Structure):
    """`cublasLtMatmulHeuristicResult_t`."""

    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class Shape(NamedTuple):
    """What decides the algorithm."""

    m: int
    n: int
    k: int
    strides: tuple[int, int, int]
    """elements between rows of x, weight and residual"""
    bias: bool
    gelu: bool
    residual: bool
    dtype: torch.dtype
    device: int


@dataclass
class Product:
    """A shape with its descriptors and the algorithm that was chosen."""

    descriptor: c_void_p
    layouts: tuple[c_void_p, c_void_p, c_void_p, c_void_p]
    algorithm: _Found
    candidates: int = 1
    first_us: float = 0.0
    best_us: float = 0.0


_PRODUCTS: dict[Shape, Product] = {}


@cache
def _library() -> ctypes.CDLL:
    """The library that torch has loaded already."""
    assert torch.version.cuda is not None
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


def _do(name: str, *arguments: object) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} failed with cublasStatus_t {status}")


def _set(function: str, target: c_void_p, attribute: int, value: ctypes._SimpleCData[Any]) -> None:
    _do(function, target, attribute, byref(value), c_size_t(ctypes.sizeof(value)))


@cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _do("cublasLtCreate", byref(handle))
    return handle


@cache
def _workspace(device: int) -> Tensor:
    """One for all products: they follow one another on one stream."""
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=f"cuda:{device}")


def _described(shape: Shape) -> Product:
    """The descriptors: row-major [M, N] = x W^T is column-major [N, M] = W^T^T x^T."""
    descriptor = c_void_p()
    _do("cublasLtMatmulDescCreate", byref(descriptor), _COMPUTE_FLOAT, _FLOAT)
    epilogue = _EPILOGUES[shape.bias, shape.gelu]
    for attribute, value in ((_TRANSPOSE_A, c_int(1)), (_EPILOGUE, c_int(epilogue))):
        _set("cublasLtMatmulDescSetAttribute", descriptor, attribute, value)
    layouts = []
    stride_x, stride_weight, stride_residual = shape.strides
    for rows, columns, stride in (
        (shape.k, shape.n, stride_weight),
        (shape.k, shape.m, stride_x),
        (shape.n, shape.m, stride_residual if shape.residual else shape.n),
        (shape.n, shape.m, shape.n),
    ):
        layout = c_void_p()
        _do(
            "cublasLtMatrixLayoutCreate", byref(layout), _TYPES[shape.dtype], c_uint64(rows),
            c_uint64(columns), c_int64(stride),
        )  # fmt: skip
        layouts.append(layout)
    weight, x, residual, out = layouts
    return Product(descriptor, (weight, x, residual, out), _Found())


def _offered(product: Product, device: int) -> list[_Found]:
    """The algorithms of the heuristic in its order."""
    preference, limit = c_void_p(), c_size_t(WORKSPACE)
    _do("cublasLtMatmulPreferenceCreate", byref(preference))
    _set("cublasLtMatmulPreferenceSetAttribute", preference, _MAX_WORKSPACE, limit)
    found, count = (_Found * CANDIDATES)(), c_int()
    _do(
        "cublasLtMatmulAlgoGetHeuristic", _handle(device), product.descriptor, *product.layouts,
        preference, CANDIDATES, found, byref(count),
    )  # fmt: skip
    _do("cublasLtMatmulPreferenceDestroy", preference)
    usable = [one for one in found[: count.value] if one.state == 0]
    if not usable:
        raise RuntimeError("cuBLASLt offers no algorithm")
    return usable


class Operands(NamedTuple):
    """x [M, K], weight [N, K], bias [N], residual and out [M, N]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    out: Tensor


def _launch(product: Product, algorithm: _Found, o: Operands, device: int) -> None:
    if o.bias is not None:
        pointer = c_void_p(o.bias.data_ptr())
        _set("cublasLtMatmulDescSetAttribute", product.descriptor, _BIAS, pointer)
    weight, x, residual, out = product.layouts
    one, added = c_float(1.0), c_float(0.0 if o.residual is None else 1.0)
    third = o.out if o.residual is None else o.residual
    workspace = _workspace(device)
    _do(
        "cublasLtMatmul", _handle(device), product.descriptor,
        byref(one), c_void_p(o.weight.data_ptr()), weight, c_void_p(o.x.data_ptr()), x,
        byref(added), c_void_p(third.data_ptr()), residual, c_void_p(o.out.data_ptr()), out,
        byref(algorithm), c_void_p(workspace.data_ptr()), c_size_t(WORKSPACE),
        c_void_p(torch.cuda.current_stream(device).cuda_stream),
    )  # fmt: skip


def _search(shape: Shape, o: Operands) -> Product:
    """Time what is offered: all of it a few times, then the best ones again with more calls."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{shape} comes first in a capture; its algorithms are timed before")
    product, device = _described(shape), shape.device
    offered = _offered(product, device)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=o.x.device)

    def microseconds(algorithm: _Found, calls: int) -> float:
        spans = []
        for _ in range(calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()  # the weights out of the cache
            o.x.clone()  # and the activations into it
            begin.record()
            _launch(product, algorithm, o, device)
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize(device)
        return statistics.median(a.elapsed_time(b) for a, b in spans) * 1000

    microseconds(offered[0], 5)
    ranked = sorted(offered, key=lambda algorithm: microseconds(algorithm, 5))
    times = [(microseconds(algorithm, 25), algorithm) for algorithm in ranked[:6]]
    first = microseconds(offered[0], 25)
    best, algorithm = min(times, key=lambda pair: pair[0])
    if best > first * GAIN:
        best, algorithm = first, offered[0]
    product.algorithm, product.candidates = algorithm, len(offered)
    product.first_us, product.best_us = first, best
    return product


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:  # fmt: skip
    rows, added = as_rows(x), None if residual is None else as_rows(residual)
    device = x.device.index
    strides = (rows.stride(0), weight.stride(0), 0 if added is None else added.stride(0))
    shape = Shape(
        rows.shape[0], weight.shape[0], rows.shape[1], strides, bias is not None, gelu,
        added is not None, x.dtype, device,
    )  # fmt: skip
    out = x.new_empty(rows.shape[0], weight.shape[0])
    operands = Operands(rows, weight, bias, added, out)
    product = _PRODUCTS.get(shape)
    if product is None:
        product = _PRODUCTS[shape] = _search(shape, operands)
    _launch(product, product.algorithm, operands, device)
    return out.view(*x.shape[:-1], weight.shape[0])


def searched_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """x [..., K] @ weight [N, K]^T + bias [N] -> [..., N], then GELU (tanh form), or + residual.

    On a GPU (16 bits) these act on the float32 sums, which are rounded once.
    """
    out = F.linear(x, weight, bias)
    out = ops.gelu(out) if gelu else out
    return out if residual is None else residual + out


searched_linear = operator("searched_linear", of_product)(searched_linear_reference)
searched_linear.register_kernel("cuda", _run)


Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear(few_rows: Linear, most: int) -> Linear:
    """`Ops.linear`: `few_rows` for at most `most` rows, the searched product for more."""

    def searched(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() // x.shape[-1] <= most:
            return few_rows(x, weight, bias)
        out: Tensor = searched_linear(x, weight, bias)
        return out

    return searched


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`Ops.linear_gelu`."""
    out: Tensor = searched_linear(x, weight, bias, None, True)
    return out


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`Ops.linear_add`."""
    out: Tensor = searched_linear(x, weight, bias, residual)
    return out


def searched() -> list[str]:
    """A line for each shape that was searched in this process."""
    return [
        f"blas.algorithm=searched: [{s.m}, {s.k}] x [{s.k}, {s.n}]"
        f"{' GELU' if s.gelu else ''}{' + residual' if s.residual else ''}: {p.best_us:.1f} us, "
        f"the heuristic's first {p.first_us:.1f} us, of {p.candidates}"
        for s, p in _PRODUCTS.items()
    ]
