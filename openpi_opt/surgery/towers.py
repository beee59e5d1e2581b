"""The layers of the towers with their types, which `nn.ModuleList` does not tell."""

from typing import cast

from openpi_opt.pi0.gemma import GemmaLayer, GemmaTower
from openpi_opt.pi0.siglip import EncoderLayer, VisionTower


def gemma_layers(tower: GemmaTower) -> list[GemmaLayer]:
    """The layers of a Gemma tower."""
    return [cast(GemmaLayer, layer) for layer in tower.layers]


def vision_layers(tower: VisionTower) -> list[EncoderLayer]:
    """The layers of the SigLIP tower."""
    return [cast(EncoderLayer, layer) for layer in tower.encoder.layers]
