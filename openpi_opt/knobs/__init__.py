"""The registry of knobs, in the order in which they are applied.

Every knob folds what it folds in float32 before any transforms (`Knob.fold`). Of the
transformations, precision comes first because it casts what later knobs fuse or capture; simplify
comes before fusion because it says which projections are left to be fused; attention swaps
operations inside what `compile` then traces; `graph` captures whatever the others made.
"""

from __future__ import annotations

from openpi_opt.knobs.attention import Attention
from openpi_opt.knobs.base import AnyKnob
from openpi_opt.knobs.blas import Blas
from openpi_opt.knobs.compile import Compile
from openpi_opt.knobs.elementwise import Elementwise
from openpi_opt.knobs.environment import Environment
from openpi_opt.knobs.fusion import Fusion
from openpi_opt.knobs.gemm import Gemm
from openpi_opt.knobs.graph import Graph
from openpi_opt.knobs.precision import Precision
from openpi_opt.knobs.simplify import Simplify
from openpi_opt.knobs.vision import Vision

KNOBS: tuple[AnyKnob, ...] = (
    Environment(),
    Precision(),
    Simplify(),
    Fusion(),
    Vision(),
    Attention(),
    Elementwise(),
    Gemm(),
    Blas(),
    Compile(),
    Graph(),
)
BY_NAME: dict[str, AnyKnob] = {knob.name: knob for knob in KNOBS}
