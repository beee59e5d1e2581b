"""Layers of which only the keys and values are read.

Letters: B batch, S tokens, W width, Hkv key/value heads, D head dim.
"""

from torch import Tensor

from openpi_opt.pi0.gemma import Attending, GemmaLayer, KeysValues, Past
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.surgery.towers import gemma_layers


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
