"""Products whose algorithm was searched, against float64, eager and captured."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from distances import distance
from torch import Tensor

from openpi_opt.kernels import cublaslt
from openpi_opt.kernels.cublaslt import searched_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.version.cuda is None, reason="cuBLASLt is NVIDIA's"),
]
# M, N, K of vision's fc1 and fc2 and of the prefix's down.
SHAPES = [(768, 4304, 1152), (768, 1152, 4304), (788, 2048, 16384)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["plain", "bias", "gelu", "residual", "bias, residual"])
def test_numbers(shape: tuple[int, int, int], end: str) -> None:
    m, n, k = shape
    x, weight = randn(1, m, k), randn(n, k, seed=1) * k**-0.5
    bias = randn(n, seed=2) if "bias" in end or end == "gelu" else None
    residual = randn(1, m, n, seed=3) if "residual" in end else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if end == "gelu":
        expected = F.gelu(expected, approximate="tanh")
    if residual is not None:
        expected = expected + residual.double()
    call = (x, weight, bias, residual, end == "gelu")
    out = searched_linear(*call)
    assert distance(out, expected) < 3e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = searched_linear(*call)
    captured.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, out)
    assert cublaslt.searched()


def test_a_search_in_a_capture_is_refused() -> None:
    x, weight = randn(1, 96, 64), randn(48, 64)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="comes first in a capture"), torch.cuda.graph(graph):
        searched_linear(x, weight)
