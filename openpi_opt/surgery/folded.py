"""Norm gains folded into the projections that follow them.

A gain before a linear layer is a scaling of that layer's columns, a bias before it a bias of it.
Folding changes weights, and rounding them before instead of after would give other numbers, so it
is done in float32, before the policy is cast. The result is an equivalent checkpoint under the same
names, with neutral norms; loading other weights into the folded policy would lose their gains.

Letters: W width.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from openpi_opt.pi0 import gemma, siglip
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.surgery.layers import gemma_layers, vision_layers


class UnitRmsNorm(gemma.RmsNorm):
    """RMSNorm without a gain; its weight stays, as zeros, for the file."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return self.ops.rms_norm(x, None, gemma.EPS)


class UnitLayerNorm(siglip.LayerNorm):
    """LayerNorm without gain and bias; they stay, as ones and zeros, for the file."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return self.ops.layer_norm(x, None, None, self.eps)


def fold_norms(policy: Pi0Policy) -> None:
    """Fold every norm into the next linear layers.

    Gemma: 1 + weight into q, k, v and gate, up; the expert's final norm into `action_out_proj`.
    SigLIP: weight and bias into q, k, v and fc1; `post_layernorm` into the projector. The language
    model's final norm is never computed. The gains of pi05's expert change from step to step and
    stay where they are.
    """
    if policy.dtype != torch.float32:
        raise ValueError(f"Norms are folded in float32, before the cast; this is {policy.dtype}.")
    _fold_gemma(policy.language)
    if isinstance(policy.expert, gemma.GemmaTower):
        _fold_gemma(policy.expert)
        _fold_gain(policy.expert.norm, (policy.action_out_proj,))
    for layer in vision_layers(policy.vision):
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        _fold_affine(layer.layer_norm1, projections)
        _fold_affine(layer.layer_norm2, (layer.mlp.fc1,))
    _fold_affine(policy.vision.post_layernorm, (cast(nn.Linear, policy.projector),))


def _fold_gemma(tower: gemma.GemmaTower) -> None:
    for layer in gemma_layers(tower):
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        _fold_gain(layer.input_layernorm, projections)
        _fold_gain(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))


def _fold_gain(norm: gemma.RmsNorm, linears: Sequence[nn.Linear]) -> None:
    for linear in linears:
        linear.weight.mul_(1.0 + norm.weight)
    norm.weight.zero_()
    norm.__class__ = UnitRmsNorm


def _fold_affine(norm: siglip.LayerNorm, linears: Sequence[nn.Linear]) -> None:
    for linear in linears:
        linear.bias.add_((linear.weight.double() @ norm.bias.double()).float())
        linear.weight.mul_(norm.weight)
    norm.weight.fill_(1.0)
    norm.bias.zero_()
    norm.__class__ = UnitLayerNorm
