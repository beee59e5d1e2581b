"""A layer of the action expert in six launches (eight on AMD), for a denoising step's few rows.

In a step 11 rows (10 without the state token) go through 18 layers, ten times an inference. As
PyTorch operations a layer is some thirty launches, most of them shorter than the gaps between them.
Here norms, activation and residuals are part of the products around them, and attention reads the
prefix's keys where the prefill left them, so no step copies or writes a cache. The product that
makes the residual stream also sums its squares and multiplies it by the gain of the next norm; the
product that reads it scales its own result.

The norms of pi05 have a gain, a shift and a gate that are constants of the step. The gate is a
factor of the product's result, and the shift becomes a bias, shift @ W^T, computed once.

Of more rows than the kernels are for (`max_rows`; batches) torch's products are as good; then only
the attention is the own kernel, and the rest are the policy's operations.

Vendors: NVIDIA and AMD (not run on AMD). Source: Dexmal/realtime-vla writes its decoder as such a
chain of Triton kernels; the kernels here are `triton_skinny_gemm`, `triton_rotary` and
`triton_decode` of `openpi_opt.kernels`.

Letters: B batch, S tokens of the call, N keys before them, T all keys, W width, Hq query heads, Hkv
key/value heads, D head dim, F MLP width, M norms of the tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from openpi_opt.kernels.launch import LINEAR, encoded
from openpi_opt.kernels.triton_decode import CachedAttention, cached_attention
from openpi_opt.kernels.triton_rotary import rotary
from openpi_opt.kernels.triton_skinny_gemm import MAX_ROWS, skinny_linear, skinny_linear_onward
from openpi_opt.pi0.adaptive import AdaptiveTower
from openpi_opt.pi0.gemma import (
    EPS,
    Attending,
    GemmaLayer,
    GemmaTower,
    KeysValues,
    LayerParts,
    Past,
    RmsNorm,
)
from openpi_opt.pi0.layers import Linear
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.surgery.folded import UnitRmsNorm
from openpi_opt.surgery.fused import FusedAttention, FusedMlp
from openpi_opt.surgery.layers import BufferedKeysValues, expert_layers

LINEARS = ("qkv", "out", "gate_up", "down")
"""The products of a layer, by the names under which their launch parameters are given."""


class Kernels(NamedTuple):
    """What the layers of one tower have in common."""

    attend: CachedAttention
    launches: Mapping[str, Sequence[int]]
    """for each of `LINEARS`, as `launch.encoded` writes it"""
    max_rows: int


class Constants(NamedTuple):
    """What a layer's norms and branches add in one step, float32; None where pi0 has none."""

    gain_in: Tensor | None
    """[W]; the kernels add 1"""
    bias_qkv: Tensor | None
    gate_attention: Tensor | None
    """[W]"""
    gain_mlp: Tensor | None
    bias_gate_up: Tensor | None
    gate_mlp: Tensor | None


class Stream(NamedTuple):
    """The residual stream between two layers, [B, S, W], and what its next norm needs."""

    x: Tensor
    scaled: Tensor | None = None
    """x * (1 + gain); None where that is x, or where plain operations will norm x"""
    squares: Tensor | None = None
    """[P, B * S] float32, whose sum over P is that of the squares of x"""


def entering(kernels: Kernels, x: Tensor, gain: Tensor | None) -> Stream:
    """What the layers get; the gain is the first norm's."""
    if x.shape[0] * x.shape[1] > kernels.max_rows:
        return Stream(x)
    wide = x.float()
    scaled = None if gain is None else (wide * (1.0 + gain)).to(x.dtype)
    return Stream(x, scaled, wide.square().sum(-1).view(1, -1))


def step(
    layer: LayerParts,
    stream: Stream,
    how: Attending,
    past: Past | None,
    c: Constants,
    next_gain: Tensor | None,
) -> tuple[Stream, KeysValues]:
    """A layer -> the stream for a norm with `next_gain`, and the call's own keys and values.

    These keys [B, S, Hkv, D] are before their rotary embedding, which the attention kernel does on
    the way.
    """
    kernels = cast(Kernels, layer.kernels)
    attention, mlp = cast(FusedAttention, layer.self_attn), cast(FusedMlp, layer.mlp)
    qkv = _normed(kernels, "qkv", attention.qkv_proj, stream, c.gain_in, c.bias_qkv)
    heads = qkv.view(*stream.x.shape[:-1], -1, attention.head_dim)
    counts = (attention.heads, attention.kv_heads, attention.kv_heads)
    q, k, v = heads.split(counts, dim=-2)
    before = (k[:, :0], v[:, :0]) if past is None else _stored(past)
    seen = kernels.attend(q, before, (k, v), how.rope, how.visibility, attention.scale).flatten(2)
    stream = _added(kernels, "out", attention.o_proj, seen, stream, c.gate_attention, c.gain_mlp)
    hidden = _normed(kernels, "gate_up", mlp.gate_up_proj, stream, c.gain_mlp, c.bias_gate_up)
    stream = _added(kernels, "down", mlp.down_proj, hidden, stream, c.gate_mlp, next_gain)
    return stream, KeysValues(k, v)


def _normed(
    kernels: Kernels,
    name: str,
    linear: Linear,
    stream: Stream,
    gain: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """norm(x) @ weight^T + bias; of `gate_up` GELU(gate) * up."""
    gated = name == "gate_up"
    if stream.squares is not None:
        x = stream.x if stream.scaled is None else stream.scaled
        launch = kernels.launches[name]
        out: Tensor = skinny_linear(x, linear.weight, bias, stream.squares, EPS, gated, launch)
        return out
    ops = linear.ops
    out = linear(ops.rms_norm(stream.x, gain, EPS))
    out = out if bias is None else (out + bias).to(out.dtype)
    return ops.gelu_mul(*out.chunk(2, dim=-1)) if gated else out


def _added(
    kernels: Kernels,
    name: str,
    linear: Linear,
    branch: Tensor,
    stream: Stream,
    gate: Tensor | None,
    gain: Tensor | None,
) -> Stream:
    """x + branch @ weight^T * gate, for a norm with `gain`."""
    if stream.squares is not None:
        x, scaled, squares = skinny_linear_onward(
            branch, linear.weight, stream.x, gate, gain, kernels.launches[name]
        )
        return Stream(x, None if gain is None else scaled, squares)
    out = linear(branch)
    return Stream(stream.x + (out if gate is None else (out * gate).to(out.dtype)))


class FusedExpertLayer(GemmaLayer):
    """A Gemma layer of few rows, B * S, as a chain of fused kernels.

    The fewer roundings are the only difference from the plain layer: a normed input, gate and up
    are never rounded, and a sum with its residual is rounded once.
    """

    @property
    def constants(self) -> Constants:
        """The gains, which are constants of the model."""
        gains = [norm_gain(norm) for norm in (self.input_layernorm, self.post_attention_layernorm)]
        return Constants(gains[0], None, None, gains[1], None, None)

    def forward(self, x: Tensor, how: Attending, past: Past | None) -> tuple[Tensor, KeysValues]:
        """As in `GemmaLayer`; `how.attend` is not called, its cached form is the layer's own."""
        constants = self.constants
        stream = entering(cast(Kernels, self.kernels), x, constants.gain_in)
        stream, own = step(self, stream, how, past, constants, None)
        own = KeysValues(rotary(own.keys, *how.rope), own.values)
        return stream.x, own if past is None else past.joined(*own)


def _layered(
    layers: Sequence[LayerParts],
    x: Tensor,
    how: Attending,
    past: Sequence[Past] | None,
    constants: Sequence[Constants],
) -> Tensor:
    """The layers of a tower, each with its constants."""
    gains = [*(c.gain_in for c in constants), None]
    stream = entering(cast(Kernels, layers[0].kernels), x, gains[0])
    for index, layer in enumerate(layers):
        before = None if past is None else past[index]
        stream, _ = step(layer, stream, how, before, constants[index], gains[index + 1])
    return stream.x


class FusedExpertTower(GemmaTower):
    """A tower of such layers that keeps no caches: what a denoising step would join, none reads.

    Who needs the joined ones (the state token, run once before the steps) calls the layers.
    """

    def forward(
        self, x: Tensor, how: Attending, past: Sequence[Past] | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """As in `GemmaTower`, but no keys and values are returned."""
        constants = [cast(FusedExpertLayer, layer).constants for layer in self.layers]
        return _layered(expert_layers(self), x, how, past, constants), []


class FusedAdaptiveTower(AdaptiveTower):
    """A tower of such layers, which reads the constants of a step from one flat row.

    `constants` makes the rows of all steps from their modulations; nothing else may be called with
    modulations.
    """

    def constants(self, modulations: Tensor) -> Tensor:
        """Scale, shift and gate of every norm in every step, [steps, M, 3W] -> [steps, C] float32.

        The fields of `Constants` of each layer in order, then scale and shift [W] of the last
        norm. Biases are sums in float64, rounded once.
        """
        columns = []
        for index, layer in enumerate(expert_layers(self)):
            attention, mlp = cast(FusedAttention, layer.self_attn), cast(FusedMlp, layer.mlp)
            branches = (
                (attention.qkv_proj, modulations[:, 2 * index]),
                (mlp.gate_up_proj, modulations[:, 2 * index + 1]),
            )
            for into, rows in branches:
                scale, shift, gate = rows.double().chunk(3, dim=1)
                columns += [scale, shift @ into.weight.double().T, gate]
        scale, shift, _ = modulations[:, -1].double().chunk(3, dim=1)
        return torch.cat((*columns, scale, shift), dim=1).float()

    def forward(
        self, x: Tensor, how: Attending, past: Sequence[Past], modulations: Tensor
    ) -> tuple[Tensor, list[KeysValues]]:
        """As in `AdaptiveTower`, of a row [C] of `constants`; no keys and values are returned."""
        x = self.layered(x, how, past, modulations)
        scale, shift = modulations[-2 * self.norm.dense.in_features :].chunk(2)
        return self.norm.ops.adaptive_rms_norm(x, scale, shift, EPS), []

    def layered(self, x: Tensor, how: Attending, past: Sequence[Past], row: Tensor) -> Tensor:
        """The layers without the final norm, of a row [C] of `constants`."""
        return _layered(expert_layers(self), x, how, past, self._rows(row))

    def _rows(self, row: Tensor) -> list[Constants]:
        """The constants of each layer: views of a row [C]."""
        layer = expert_layers(self)[0]
        width = self.norm.dense.in_features
        qkv = cast(FusedAttention, layer.self_attn).qkv_proj.out_features
        gate_up = cast(FusedMlp, layer.mlp).gate_up_proj.out_features
        parts = (width, qkv, width, width, gate_up, width)
        used = row[: sum(parts) * len(self.layers)].view(len(self.layers), -1)
        return [Constants(*of_layer.split(parts)) for of_layer in used.unbind()]


def norm_gain(norm: RmsNorm) -> Tensor | None:
    """The weight that the kernels add to 1; None when it was folded into the projections."""
    return None if isinstance(norm, UnitRmsNorm) else norm.weight


def _stored(past: Past) -> tuple[Tensor, Tensor]:
    """The keys and values [B, N, Hkv, D] before a call's own: of a buffer the filled rows."""
    if isinstance(past, BufferedKeysValues):
        return past.keys[:, : past.filled], past.values[:, : past.filled]
    return past.keys, past.values


def fuse_expert_layers(
    policy: Pi0Policy,
    launches: Mapping[str, Mapping[str, int]] | None = None,
    max_rows: int = MAX_ROWS,
) -> None:
    """Turn the expert, whose projections are fused, into a fused tower in place.

    `launches` go over the launch parameters of the kernels: of `attention`, and of each of
    `LINEARS`. Of more than `max_rows` rows the products are those of `Ops.linear`.

    Raises ValueError: q, k, v or gate, up are not fused, or a launch parameter is unknown.
    """
    given = dict(launches or {})
    attend = cached_attention(given.pop("attention", None))
    if unknown := set(given) - set(LINEARS):
        raise ValueError(f"{sorted(unknown)} are not among attention, {', '.join(LINEARS)}")
    kernels = Kernels(
        attend, {name: encoded(LINEAR, given.get(name)) for name in LINEARS}, max_rows
    )
    layers = expert_layers(policy.expert)
    if not all(
        isinstance(layer.self_attn, FusedAttention) and isinstance(layer.mlp, FusedMlp)
        for layer in layers
    ):
        raise ValueError("fuse_qkv and fuse_gate_up come before fuse_expert_layers")
    adaptive = isinstance(policy.expert, AdaptiveTower)
    for layer in layers:
        layer.kernels = kernels  # type: ignore[assignment]
        if not adaptive:
            layer.__class__ = FusedExpertLayer
    policy.expert.__class__ = FusedAdaptiveTower if adaptive else FusedExpertTower
