"""A call with compiled parts: compiled once, at the first call, or the trial ends.

torch.compile recompiles without a word when a guard fails; a benchmark then times something else
than it compiled, or compiles between two samples. The first call must compile exactly one graph per
part, and later calls run under the stance "fail_on_recompile", which raises. The alternative,
`torch._dynamo.config.error_on_recompile`, also refuses a second policy in the same process, since
Dynamo's cache belongs to the code and not to the instance.

Inductor's own graph capture (mode reduce-overhead) is skipped with a log line only when it does not
like something; its counter is read instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openpi_opt.pi0.inputs import Inputs


class CompilationError(RuntimeError):
    """Something was compiled more than once, in pieces, or not captured as asked."""


class CompiledCall:
    """`call`, in which `parts` functions are compiled; `captured` when Inductor captures them.

    Captured parts write their results into memory of their graphs. Marking the start of a call
    tells Inductor that the results of the last one may be overwritten, and the actions are
    returned as a copy.
    """

    def __init__(self, call: Callable[[Inputs], Tensor], parts: int, captured: bool = False):
        self._call = call
        self._parts = parts
        self._captured = captured
        self._settled = False

    def __call__(self, inputs: Inputs) -> Tensor:
        """The actions [B, H, A].

        Raises:
            CompilationError: at the first call, when it compiled more graphs than parts or Inductor
                skipped a capture.
            RuntimeError: at a later call that would recompile.
        """
        if self._captured:
            torch.compiler.cudagraph_mark_step_begin()
        if not self._settled:
            actions = self._first(inputs)
        else:
            with torch.compiler.set_stance("fail_on_recompile"):
                actions = self._call(inputs)
        return actions.clone() if self._captured else actions

    def _first(self, inputs: Inputs) -> Tensor:
        graphs, skips = graphs_compiled(), _skipped_captures()
        actions = self._call(inputs)
        compiled = graphs_compiled() - graphs
        if compiled > self._parts:
            raise CompilationError(
                f"{compiled} graphs were compiled for {self._parts} functions: there were graph "
                "breaks or recompilations (TORCH_LOGS=graph_breaks,recompiles tells which)"
            )
        if self._captured and _skipped_captures() > skips:
            raise CompilationError(
                "Inductor did not capture its graphs as this mode asks (TORCH_LOGS=perf_hints "
                "tells why)"
            )
        self._settled = True
        return actions


def graphs_compiled() -> int:
    """Graphs that Dynamo has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _skipped_captures() -> int:
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])
