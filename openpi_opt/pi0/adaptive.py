"""The action expert of pi05: a Gemma tower whose norms follow the time of the denoising step.

Every norm has a `dense` layer that makes its gain, its shift and the gate of the branch behind it
from one condition, which all tokens and all elements of a batch share: they are at the same time.
These layers are float32 in every precision. Source: openpi's `GemmaRMSNorm` with `cond`, and
`_gated_residual`.

Letters: B batch, S tokens of this call, T all keys, W width, Hkv key/value heads, D head dim, M
norms of the tower (two for each layer, and the final one).
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from openpi_opt.pi0.config import GemmaConfig
from openpi_opt.pi0.gemma import EPS, Attending, KeysValues, LayerParts, Past
from openpi_opt.pi0.ops import Ops


class AdaptiveRmsNorm(nn.Module):
    """RMSNorm with gain 1 + scale and a shift, computed by `ops.adaptive_rms_norm`."""

    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, W], modulation [3W] (scale, shift, gate) -> the normed x, and the gate [W].

        The gate has x's dtype: it multiplies the output of the branch that reads the normed x.
        """
        scale, shift, gate = modulation.chunk(3)
        return self.ops.adaptive_rms_norm(x, scale, shift, EPS), gate.to(x.dtype)


class AdaptiveLayer(LayerParts):
    """x + gate * attention(norm(x)), then x + gate * mlp(norm(x))."""

    def __init__(self, config: GemmaConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        self.input_layernorm = AdaptiveRmsNorm(config.width, ops)
        self.post_attention_layernorm = AdaptiveRmsNorm(config.width, ops)

    def forward(
        self,
        x: Tensor,
        how: Attending,
        past: Past | None,
        modulations: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, KeysValues]:
        """[B, S, W] and the modulations [3W] of both norms -> the same shape, keys and values."""
        y, gate = self.input_layernorm(x, modulations[0])
        out, cache = self.self_attn(y, how, past)
        x = x + out * gate
        y, gate = self.post_attention_layernorm(x, modulations[1])
        return x + self.mlp(y) * gate, cache


class AdaptiveTower(nn.Module):
    """The layers and the final norm."""

    def __init__(self, config: GemmaConfig, ops: Ops) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AdaptiveLayer(config, ops) for _ in range(config.depth))
        self.norm = AdaptiveRmsNorm(config.width, ops)

    def norms(self) -> list[AdaptiveRmsNorm]:
        """The M norms in the order in which they act."""
        layers = [cast(AdaptiveLayer, layer) for layer in self.layers]
        pairs = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in layers]
        return [norm for pair in pairs for norm in pair] + [self.norm]

    def modulations(self, condition: Tensor) -> Tensor:
        """The condition [W] float32 -> scale, shift and gate of every norm, [M, 3W] float32."""
        return torch.stack([norm.dense(condition) for norm in self.norms()])

    def constants(self, modulations: Tensor) -> Tensor:
        """The modulations of all steps [steps, M, 3W] -> what `forward` takes of them, by step."""
        return modulations

    def forward(
        self, x: Tensor, how: Attending, past: Sequence[Past], modulations: Tensor
    ) -> tuple[Tensor, list[KeysValues]]:
        """[B, S, W], modulations [M, 3W] -> *normed* hidden states, each layer's keys and values.

        `past[i]` holds the keys and values that layer i sees before its own. The gate of the final
        norm is read by nobody.
        """
        rows = modulations.unbind()
        caches = []
        for index, layer in enumerate(self.layers):
            pair = rows[2 * index], rows[2 * index + 1]
            x, cache = layer(x, how, past[index], pair)
            caches.append(cache)
        return self.norm(x, rows[-1])[0], caches
