"""Whole-call capture and replay: one CUDA or HIP graph per inference.

Dynamo cannot trace while a stream is being captured: it reads the state of the GPU's random
generator, which a capture forbids, on NVIDIA and AMD alike (pytorch #131782, #167639). Patching
that away, as sunxxuns/openpi-1 does, has no effect from torch 2.9.1 on. So the exact call is warmed
up first, on a side stream, and the capture runs under a stance that forbids recompilation; that no
graph was compiled in between is checked as well. A capture that fails raises; there is no way on
without the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from openpi_opt.kernels.compiled import graphs_compiled
from openpi_opt.pi0.inputs import Inputs

_WARMUPS = 3


class CaptureError(RuntimeError):
    """The call could not be captured, or something was compiled while it was."""


class CapturedCall:
    """Replay of `call` over static inputs; new inputs are copied in before each replay.

    The graph is captured at the first call. Later inputs must have the same shapes and dtypes. The
    returned actions are a copy: the static output is overwritten by the next replay.

    Threads take turns: there is one set of static inputs. On the device a call waits for the one
    before it, which may have run on another stream.
    """

    def __init__(self, call: Callable[[Inputs], Tensor]):
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        self._turn = threading.Lock()
        self._done: torch.cuda.Event | None = None
        self.inputs: Inputs
        self.output: Tensor

    def __call__(self, inputs: Inputs) -> Tensor:
        """Copy `inputs` in, replay, return the actions [B, H, A].

        Raises:
            CaptureError: at the first call, when the capture fails.
            ValueError: shapes or dtypes other than those captured.
        """
        with self._turn:
            return self._replay(inputs)

    def _replay(self, inputs: Inputs) -> Tensor:
        if self._graph is None:
            self._capture(inputs)
        if self._done is not None:
            self._done.wait()
        for name, static, new in zip(Inputs._fields, self.inputs, inputs, strict=True):
            if static.shape != new.shape:
                raise ValueError(
                    f"{name} has shape {list(new.shape)}, but the graph was captured for "
                    f"{list(static.shape)}. Build the policy for this workload."
                )
            if static.dtype != new.dtype:
                raise ValueError(
                    f"{name} is {new.dtype}, but the graph was captured with {static.dtype}"
                )
            static.copy_(new)
        assert self._graph is not None
        self._graph.replay()
        actions = self.output.clone()
        if self._done is not None:
            self._done.record()
        return actions

    def _capture(self, inputs: Inputs) -> None:
        self.inputs = Inputs(*(tensor.clone() for tensor in inputs))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUPS):
                self._call(self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with nothing_compiled(), torch.cuda.graph(graph):
                self.output = self._call(self.inputs)
        except RuntimeError as error:
            raise CaptureError(f"graph capture failed: {error}") from error
        self._graph, self._done = graph, torch.cuda.Event()


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Nothing is compiled inside, or it raises: RuntimeError by Dynamo, or CaptureError."""
    compiled = graphs_compiled()
    with torch.compiler.set_stance("fail_on_recompile"):
        yield
    if graphs_compiled() != compiled:
        raise CaptureError("something was compiled during graph capture")
