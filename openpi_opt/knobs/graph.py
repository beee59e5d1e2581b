"""Knob `graph`: capture the whole call in one CUDA or HIP graph and replay it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from openpi_opt.knobs.base import Configuration, Knob, Options, Refusal

if TYPE_CHECKING:
    from openpi_opt.knobs.base import Call
    from openpi_opt.machine import Machine


class GraphOptions(Options):
    """`manual` captures the whole `sample_actions` call: vision, prefill and all steps."""

    mode: Literal["none", "manual"] = "none"


class Graph(Knob[GraphOptions]):
    """Replay one captured graph per inference: no launch cost per kernel. NVIDIA and AMD.

    Reported: 63.1 to 30.1 ms on MI350 (sunxxuns/openpi-1, `OPENPI_MANUAL_CUDAGRAPH`). A capture
    that fails ends the trial; nothing is timed without the graph that was asked for. Inductor's
    own capture is `compile=reduce_overhead`; the two exclude each other. Not run on AMD.
    """

    name = "graph"
    options_type = GraphOptions
    quick: ClassVar = {"mode": "manual"}  # a call of 200 ms is measured for half a minute

    def refusals(self, cfg: Configuration, machine: Machine) -> Iterator[Refusal]:
        """Graphs exist on GPUs only."""
        if self.of(cfg).mode == "manual" and cfg.platform.device == "cpu":
            yield Refusal(
                "unavailable", "graph=manual needs a CUDA or HIP graph; this trial runs on the CPU"
            )

    def wrap(self, call: Call, cfg: Configuration) -> Call:
        """Capture at the first call, replay from then on."""
        if self.of(cfg).mode == "none":
            return call
        from openpi_opt.kernels.capture import CapturedCall

        return CapturedCall(call)

    def float32_form(self, cfg: Configuration) -> GraphOptions:
        """A replay runs what was captured."""
        return GraphOptions()
