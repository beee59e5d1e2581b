"""The registry of knobs, in the order in which they are applied.

Precision comes first because it casts what later knobs may fuse or capture; attention swaps
operations inside what `compile` then traces; `graph` captures whatever the others made.
"""

from __future__ import annotations

from openpi_opt.knobs.attention import Attention
from openpi_opt.knobs.base import AnyKnob
from openpi_opt.knobs.compile import Compile
from openpi_opt.knobs.graph import Graph
from openpi_opt.knobs.precision import Precision

KNOBS: tuple[AnyKnob, ...] = (Precision(), Attention(), Compile(), Graph())
BY_NAME: dict[str, AnyKnob] = {knob.name: knob for knob in KNOBS}
