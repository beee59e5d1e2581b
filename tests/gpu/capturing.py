"""A function in one graph of Dynamo's, then in one CUDA graph that follows new inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def replays(
    function: Callable[..., Any], given: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], Any]]:
    """Replay one captured call on `given` and on other numbers -> the arguments, what it wrote."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    static = [tensor.clone() for tensor in given]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(3):
            compiled(*static)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        captured = compiled(*static)
    for factor in (1.0, -0.5):
        for tensor, source in zip(static, given, strict=True):
            tensor.copy_(source * factor)
        graph.replay()
        torch.cuda.synchronize()
        yield static, captured
