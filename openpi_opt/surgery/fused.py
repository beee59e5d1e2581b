"""Projections of one input computed by one GEMM, with the weights of the original projections.

The fused weight owns the storage and the original parameters become views of its rows, so no
memory is doubled, files are loaded and saved under the original names, and what is written into an
original weight acts on the fused one.

Letters: B batch, S tokens, W width, Hq query heads, Hkv key/value heads, D head dim, F MLP width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpi_opt.kernels.linear_gelu import linear_gelu
from openpi_opt.pi0 import gemma, siglip
from openpi_opt.pi0.layers import Linear
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.surgery.layers import KeysValuesLayer, decoder_layers, gemma_layers, vision_layers


class FusedLinear(Linear):
    """Several linear layers of one input, stacked by rows; no part of the state dict."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        first = parts[0]
        with torch.device("meta"):
            super().__init__(
                first.in_features, sum(part.out_features for part in parts), False, first.ops
            )
        self.weight = _stack([part.weight for part in parts])
        if first.bias is not None:
            self.bias = _stack([part.bias for part in parts])

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The parts save these weights."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The parts load these weights."""


def _stack(parameters: Sequence[Tensor]) -> nn.Parameter:
    """[rows, ...] each -> one parameter of all rows, whose slices the given ones become."""
    stacked = torch.cat([parameter.data for parameter in parameters])
    rows = stacked.split([len(parameter) for parameter in parameters])
    for parameter, view in zip(parameters, rows, strict=True):
        parameter.data = view
    return nn.Parameter(stacked, requires_grad=False)


class FusedAttention(gemma.SelfAttention):
    """q, k and v of a Gemma layer in one GEMM: [2560, 2048] and [2560, 1024] in the full model."""

    qkv_proj: FusedLinear

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, W] -> q [B, S, Hq, D], k and v [B, S, Hkv, D]: strided views of one tensor."""
        heads = self.qkv_proj(x).view(*x.shape[:-1], -1, self.head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=-2)
        return q, k, v


class FusedKeysValuesLayer(KeysValuesLayer):
    """k and v of a layer of which nothing else is computed, in one GEMM."""

    kv_proj: FusedLinear

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, W] -> [B, S, Hkv, D] twice: strided views of one tensor."""
        heads = self.kv_proj(x).view(*x.shape[:-1], -1, self.self_attn.head_dim)
        k, v = heads.chunk(2, dim=-2)
        return k, v


class FusedMlp(gemma.GatedMlp):
    """gate and up in one GEMM: [32768, 2048] and [8192, 1024] in the full model."""

    gate_up_proj: FusedLinear

    def hidden(self, x: Tensor) -> Tensor:
        """[B, S, W] -> [B, S, F]; `gelu_mul` gets strided halves [B, S, F]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.ops.gelu_mul(gate, up)


class FusedVisionAttention(siglip.SelfAttention):
    """q, k and v of a SigLIP layer in one GEMM with bias: [3456, 1152] in the full model."""

    qkv_proj: FusedLinear

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, 256, W] -> q, k, v, each [N, 256, Hq, D]: strided views of one tensor."""
        heads = self.qkv_proj(x).view(*x.shape[:-1], 3, self.heads, self.head_dim)
        q, k, v = heads.unbind(-3)
        return q, k, v


class FusedVisionMlp(siglip.Mlp):
    """fc1, its bias and GELU in one GEMM: [4304, 1152] in the full model."""

    def hidden(self, x: Tensor) -> Tensor:
        """[N, 256, W] -> [N, 256, F]; the input of GELU is not rounded."""
        return self.ops.linear_gelu(x, self.fc1.weight, self.fc1.bias)


def _added(linear: Linear, x: Tensor, residual: Tensor) -> Tensor:
    """residual + linear(x) by `ops.linear_add`."""
    return linear.ops.linear_add(x, linear.weight, linear.bias, residual)


class AddingEncoderLayer(siglip.EncoderLayer):
    """A SigLIP layer whose residuals are added by the GEMMs before them."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, 256, W] -> [N, 256, W]; a sum is rounded once."""
        x = _added(self.self_attn.out_proj, self.self_attn.attended(self.layer_norm1(x)), x)
        return _added(self.mlp.fc2, self.mlp.hidden(self.layer_norm2(x)), x)


class AddingGemmaLayer(gemma.GemmaLayer):
    """A layer of the prefix whose residuals are added by the GEMMs before them."""

    def forward(
        self, x: Tensor, how: gemma.Attending, past: gemma.Past | None
    ) -> tuple[Tensor, gemma.KeysValues]:
        """As in `GemmaLayer`; a sum is rounded once."""
        heads, cache = self.self_attn.attended(self.input_layernorm(x), how, past)
        x = _added(self.self_attn.o_proj, heads, x)
        hidden = self.mlp.hidden(self.post_attention_layernorm(x))
        return _added(self.mlp.down_proj, hidden, x), cache


class PatchProduct(siglip.Embeddings):
    """The patch convolution, whose stride is its kernel's size, as one product: [1152, 588]."""

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, 224, 224] float32 in [-1, 1] -> [N, 256, W] float32, rows of patches in order."""
        convolution = self.patch_embedding
        size = convolution.kernel_size[0]
        patches = images.unfold(2, size, size).unfold(3, size, size)  # [N, 3, 16, 16, 14, 14]
        rows = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        weight = convolution.weight.flatten(1)
        return F.linear(rows, weight, convolution.bias) + self.position_embedding.weight


def _fuse(owner: nn.Module, name: str, parts: Sequence[Linear], kind: type[nn.Module]) -> None:
    """Give `owner` its parts in one, under `name`, and the class that reads it."""
    setattr(owner, name, FusedLinear(parts))
    owner.__class__ = kind


def fuse_qkv(policy: Pi0Policy) -> None:
    """One GEMM for q, k and v in every layer of both Gemma towers."""
    for layer in decoder_layers(policy):
        own = layer.self_attn
        if isinstance(layer, KeysValuesLayer):
            _fuse(layer, "kv_proj", (own.k_proj, own.v_proj), FusedKeysValuesLayer)
        else:
            _fuse(own, "qkv_proj", (own.q_proj, own.k_proj, own.v_proj), FusedAttention)


def fuse_gate_up(policy: Pi0Policy) -> None:
    """One GEMM for gate and up in every layer of both Gemma towers."""
    for layer in decoder_layers(policy):
        if not isinstance(layer, KeysValuesLayer):
            _fuse(layer.mlp, "gate_up_proj", (layer.mlp.gate_proj, layer.mlp.up_proj), FusedMlp)


def fuse_vision_qkv(policy: Pi0Policy) -> None:
    """One GEMM for q, k and v in every SigLIP layer."""
    for layer in vision_layers(policy.vision):
        own = layer.self_attn
        _fuse(own, "qkv_proj", (own.q_proj, own.k_proj, own.v_proj), FusedVisionAttention)


def fuse_vision_mlp(policy: Pi0Policy) -> None:
    """GELU in the GEMM before it in every SigLIP layer."""
    policy.ops.linear_gelu = linear_gelu
    for layer in vision_layers(policy.vision):
        layer.mlp.__class__ = FusedVisionMlp


def fuse_residuals(policy: Pi0Policy) -> None:
    """Residuals in the GEMMs before them, in every layer of SigLIP and of the prefix."""
    for vision in vision_layers(policy.vision):
        vision.__class__ = AddingEncoderLayer
    for layer in gemma_layers(policy.language):
        if not isinstance(layer, KeysValuesLayer):
            layer.__class__ = AddingGemmaLayer


def fuse_vision_patches(policy: Pi0Policy) -> None:
    """SigLIP's patch convolution as a product of float32, or of TF32 where that is on."""
    policy.vision.embeddings.__class__ = PatchProduct


FUSIONS: dict[str, Callable[[Pi0Policy], None]] = {
    "qkv": fuse_qkv,
    "gate_up": fuse_gate_up,
    "vision_qkv": fuse_vision_qkv,
    "vision_mlp": fuse_vision_mlp,
    "vision_patches": fuse_vision_patches,
    "residuals": fuse_residuals,
}
"""By the switch of knob `fusion`."""
