"""Layers as several surgeries need them: with their types, which `nn.ModuleList` does not tell; for
their keys and values alone; with a buffer for keys and values.

Letters: B batch, T keys that a buffer holds, N keys before the call's own, S tokens of the call, W
width, Hkv key/value heads, D head dim.
"""

from typing import NamedTuple, cast

from torch import Tensor

from openpi_opt.pi0.adaptive import AdaptiveTower
from openpi_opt.pi0.gemma import Attending, GemmaLayer, GemmaTower, KeysValues, LayerParts, Past
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


class KeysValuesLayer(GemmaLayer):
    """A Gemma layer that computes its norm, keys and values and nothing else."""

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, W], normed -> k, not rotated, and v, [B, S, Hkv, D] each."""
        return keys_values(self, x)

    def forward(self, x: Tensor, how: Attending, past: Past | None) -> tuple[Tensor, KeysValues]:
        """[B, S, W] -> x as it came (nobody reads it), and the layer's own keys and values."""
        k, v = self.keys_values(self.input_layernorm(x))
        return x, KeysValues(self.self_attn.ops.rotary(k, *how.rope), v)


def keys_values(layer: GemmaLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of normed tokens [B, S, W], not rotated -> [B, S, Hkv, D] each."""
    attention = layer.self_attn
    shape = (*x.shape[:-1], attention.kv_heads, attention.head_dim)
    return attention.k_proj(x).view(shape), attention.v_proj(x).view(shape)


def keep_keys_values(policy: Pi0Policy) -> None:
    """The last prefix layer yields keys and values only.

    The language model's output is discarded, so nothing reads what the layer's queries, output
    projection and MLP compute: 109 M parameters of the full model, 5.5 % of the prefill.
    """
    gemma_layers(policy.language)[-1].__class__ = KeysValuesLayer


class BufferedKeysValues(NamedTuple):
    """Keys and values [B, T, Hkv, D] of which the first `filled` rows are valid.

    A call's own rows are written behind them, in place, instead of copying the whole cache for
    every layer and denoising step. Each call overwrites all the rows it reads beyond `filled`, and
    each inference allocates its own buffers, so nothing stale can be seen.
    """

    keys: Tensor
    values: Tensor
    filled: int

    def joined(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Write a call's own [B, S, Hkv, D] -> views of all N + S rows."""
        end = self.filled + keys.shape[1]
        if end > self.keys.shape[1]:
            raise ValueError(
                f"The buffer has {self.keys.shape[1]} rows; {self.filled} are filled and "
                f"{keys.shape[1]} more do not fit."
            )
        self.keys[:, self.filled : end] = keys
        self.values[:, self.filled : end] = values
        return KeysValues(self.keys[:, :end], self.values[:, :end])


def with_room(cache: Past, rows: int) -> BufferedKeysValues:
    """Copy `cache`, [B, N, Hkv, D] each, once, into a buffer with `rows` more rows."""
    filled = cache.keys.shape[1]
    return BufferedKeysValues(_padded(cache.keys, rows), _padded(cache.values, rows), filled)


def _padded(prefix: Tensor, rows: int) -> Tensor:
    batch, filled, heads, width = prefix.shape
    buffer = prefix.new_empty(batch, filled + rows, heads, width)
    buffer[:, :filled] = prefix
    return buffer
