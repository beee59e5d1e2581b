"""The layers of the towers with their types, which `nn.ModuleList` does not tell."""

from typing import cast

from openpi_opt.pi0.adaptive import AdaptiveTower
from openpi_opt.pi0.gemma import GemmaLayer, GemmaTower, LayerParts
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.siglip import EncoderLayer, VisionTower


def gemma_layers(tower: GemmaTower) -> list[GemmaLayer]:
    """The layers of a Gemma tower."""
    return [cast(GemmaLayer, layer) for layer in tower.layers]


def expert_layers(tower: GemmaTower | AdaptiveTower) -> list[LayerParts]:
    """The layers of an action expert, whatever their norms are."""
    return [cast(LayerParts, layer) for layer in tower.layers]


def decoder_layers(policy: Pi0Policy) -> list[LayerParts]:
    """The layers of the prefix and of the expert, whatever their norms are."""
    return [*gemma_layers(policy.language), *expert_layers(policy.expert)]


def vision_layers(tower: VisionTower) -> list[EncoderLayer]:
    """The layers of the SigLIP tower."""
    return [cast(EncoderLayer, layer) for layer in tower.encoder.layers]
