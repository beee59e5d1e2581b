"""Inference of pi0 and pi05: images, prompt and robot state to a chunk of actions.

Three stages: `encode_images` (SigLIP and projector), `prefill` (the prefix through the language
model, keeping keys and values), `denoise_step` (the action expert, once for each Euler step). Each
is looked up on the instance, so assigning to `policy.denoise_step` replaces that stage.

Nothing here waits for the device or copies from the host: a call can be captured as a graph.

Letters: B batch, C cameras, L prompt slots, P prefix slots, N kept prefix keys, S suffix tokens
(the state of pi0, then actions), H horizon, A action dim, W language width, E expert width, D head
dim.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from openpi_opt.pi0.adaptive import AdaptiveTower
from openpi_opt.pi0.config import Pi0Config
from openpi_opt.pi0.gemma import (
    Attending,
    GemmaTower,
    KeysValues,
    Past,
    Rope,
    rope_at,
    rope_frequencies,
)
from openpi_opt.pi0.inputs import Inputs, Layout
from openpi_opt.pi0.layers import Linear
from openpi_opt.pi0.ops import Ops, Padding, Segment, Visibility
from openpi_opt.pi0.packing import packed, packing
from openpi_opt.pi0.schedule import step_size, time_features
from openpi_opt.pi0.siglip import VisionTower


class PrefixCache(NamedTuple):
    """What the denoising steps need to know of the prefix."""

    layers: Sequence[Past]
    """for each layer, rotated keys and values [B, N, Hkv, D]"""
    valid_count: Tensor
    """[B or 1] integer: valid prefix tokens, the position of the first suffix token"""
    mask: Tensor | None
    """[B, N] bool: the keys that may be seen; None when only valid keys were kept"""
    rope: Rope | None = None
    """rotary tables of the suffix, where they were looked up with the prefix"""


class Prefix(NamedTuple):
    """The prefix tokens as they enter the language model."""

    tokens: Tensor
    """[B, P, W]"""
    positions: Tensor
    """[B or 1, P] int64"""
    valid_count: Tensor
    """[B or 1] integer"""
    mask: Tensor
    """[B or 1, P] bool: valid tokens"""


class PaliGemmaModel(nn.Module):
    """Vision tower, projector and language model; a namespace for the file's names."""

    def __init__(self, config: Pi0Config, ops: Ops) -> None:
        super().__init__()
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = VisionTower(config.vision, ops)
        self.multi_modal_projector = nn.Module()
        self.multi_modal_projector.linear = Linear(
            config.vision.width, config.language.width, True, ops
        )
        self.language_model = GemmaTower(config.language, ops)


class PaliGemma(nn.Module):
    """The prefix model and the embedding table, which files store as `lm_head.weight`."""

    def __init__(self, config: Pi0Config, ops: Ops) -> None:
        super().__init__()
        self.model = PaliGemmaModel(config, ops)
        self.lm_head = nn.Linear(config.language.width, config.vocab_size, bias=False)


class GemmaExpert(nn.Module):
    """The action expert. Its `lm_head` is used by nothing and kept because files hold it."""

    def __init__(self, config: Pi0Config, ops: Ops) -> None:
        super().__init__()
        tower = GemmaTower if config.family == "pi0" else AdaptiveTower
        self.model: GemmaTower | AdaptiveTower = tower(config.expert, ops)
        self.lm_head = nn.Linear(config.expert.width, config.vocab_size, bias=False)


class PaliGemmaWithExpert(nn.Module):
    """Everything that the precision applies to; what is outside stays float32."""

    def __init__(self, config: Pi0Config, ops: Ops) -> None:
        super().__init__()
        self.paligemma = PaliGemma(config, ops)
        self.gemma_expert = GemmaExpert(config, ops)


class Pi0Policy(nn.Module):
    """A policy with uninitialised weights; `weights.build` and `checkpoint.load` fill them.

    `config.family` says which projections it has besides `action_in_proj` and `action_out_proj`:
    `state_proj` and `action_time_mlp_*`, or `time_mlp_*`.

    `dtype` is the dtype of the towers' activations, set by `precision.cast`.
    """

    frequencies: Tensor
    time_table: Tensor
    layout_index: Tensor
    layout_positions: Tensor
    layout_mask: Tensor
    layout_count: Tensor

    def __init__(self, config: Pi0Config, steps: int = 10) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps is {steps}; an inference needs at least 1 denoising step.")
        self.config = config
        self.steps = steps
        self.dt = step_size(steps)
        self.ops = Ops()
        self.dtype = torch.float32
        self.layout: Layout | None = None
        width = config.expert.width
        self.paligemma_with_expert = PaliGemmaWithExpert(config, self.ops)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        if config.family == "pi0":
            self.state_proj = nn.Linear(config.action_dim, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        else:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        self.requires_grad_(False)
        self.fill_buffers()

    @property
    def vision(self) -> VisionTower:
        """The SigLIP tower."""
        tower = self.paligemma_with_expert.paligemma.model.vision_tower
        return cast(VisionTower, tower.vision_model)

    @property
    def projector(self) -> nn.Module:
        """The linear layer from vision width to language width."""
        return cast(
            nn.Module, self.paligemma_with_expert.paligemma.model.multi_modal_projector.linear
        )

    @property
    def language(self) -> GemmaTower:
        """The prefix language model."""
        return self.paligemma_with_expert.paligemma.model.language_model

    @property
    def expert(self) -> GemmaTower | AdaptiveTower:
        """The action expert; adaptive in pi05."""
        return self.paligemma_with_expert.gemma_expert.model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.action_out_proj.weight.device

    def fill_buffers(self) -> None:
        """Compute the constant tables on the policy's device (again after `to_empty`)."""
        config, device = self.config, self.device
        frequencies = rope_frequencies(config.language.head_dim, config.rope_frequencies)
        table = time_features(self.steps, config.expert.width)
        self.register_buffer("frequencies", frequencies.to(device), persistent=False)
        self.register_buffer("time_table", table.to(device), persistent=False)
        self.derive()

    def declare_layout(self, layout: Layout | None) -> None:
        """Promise that every later batch has the masks of `layout`; None takes the promise back.

        The masks in the inputs are then not read, for reading them would synchronise. The caller
        asks `Layout.refusal` on the host. Visibilities get their static `segments`, and the prefix
        cache keeps the valid keys only. That is exact: a masked key's weight is exactly 0 and
        positions count valid tokens only.

        A flexible layout promises only its bounds. Masks are read on the device, which packs the
        valid tokens (`packing`); visibilities get `segments` and the `padding` behind those.
        """
        if layout is not None and layout.tokens_per_camera != self.config.vision.tokens:
            raise ValueError(
                f"The layout has {layout.tokens_per_camera} tokens a camera; "
                f"{self.config.name} has {self.config.vision.tokens}."
            )
        self.layout = layout
        self.derive()

    @property
    def prefix_layout(self) -> Layout | None:
        """What of the declared layout enters the language model: all of it."""
        return self.layout

    def derive(self) -> None:
        """Compute what follows from the layout, on the policy's device."""
        layout = self.prefix_layout
        if layout is not None and not layout.flexible:
            index = torch.tensor(layout.valid_index())
            mask = torch.zeros(1, layout.prefix_slots, dtype=torch.bool)
            mask[:, index] = True
            for name, value in (
                ("layout_index", index),
                ("layout_mask", mask),
                ("layout_positions", mask.cumsum(1) - 1),
                ("layout_count", mask.sum(1)),
            ):
                self.register_buffer(name, value.to(self.device), persistent=False)

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, C, 3, 224, 224] float32 in [-1, 1] -> image tokens [B, C*256, W], not scaled."""
        batch = images.shape[0]
        tokens = self.projector(self.vision(images.flatten(0, 1), self.dtype))
        return tokens.reshape(batch, -1, tokens.shape[-1])

    def embed_prompt(self, tokens: Tensor) -> Tensor:
        """[B, L] int64 -> [B, L, W]; language embeddings are multiplied by sqrt(W)."""
        table = self.paligemma_with_expert.paligemma.lm_head.weight
        return F.embedding(tokens, table) * math.sqrt(self.config.language.width)

    def prefill(
        self,
        image_tokens: Tensor,
        tokens: Tensor,
        image_mask: Tensor,
        token_mask: Tensor,
        state: Tensor,
    ) -> PrefixCache:
        """Image tokens [B, C*256, W], prompt [B, L] and their masks -> the prefix cache.

        The state [B, A] is for who lets its token belong to the prefix.
        """
        x = torch.cat((image_tokens, self.embed_prompt(tokens)), dim=1)
        x, positions, count, mask = self.arrange(x, image_mask, token_mask)
        visibility = self.prefix_visibility(mask, count)
        how = Attending(self.prefix_rope(positions), visibility, self.ops.attention_prefill)
        _, caches = self.language(x, how)
        layout = self.prefix_layout
        if layout is None or layout.flexible:
            return PrefixCache(caches, count, mask)
        if not layout.all_valid:
            caches = [
                KeysValues(*(tensor.index_select(1, self.layout_index) for tensor in cache))
                for cache in caches
            ]
        return PrefixCache(caches, count, None)

    def prefill_of(self, inputs: Inputs, image_tokens: Tensor) -> PrefixCache:
        """`prefill` of a batch of observations, given its image tokens [B, C*256, W]."""
        masks = inputs.image_mask, inputs.token_mask
        return self.prefill(image_tokens, inputs.tokens, *masks, inputs.state)

    def prefix_rope(self, positions: Tensor) -> Rope:
        """The rotary tables of prefix tokens at positions [B or 1, P]."""
        return rope_at(positions, self.frequencies, self.dtype)

    def arrange(self, x: Tensor, image_mask: Tensor, token_mask: Tensor) -> Prefix:
        """Tokens [B, P, W], masks [B, C] and [B, L] -> the prefix as the layout has it."""
        layout = self.prefix_layout
        if layout is not None and not layout.flexible:
            return Prefix(x, self.layout_positions, self.layout_count, self.layout_mask)
        camera_mask = image_mask.repeat_interleave(self.config.vision.tokens, dim=1)
        mask = torch.cat((camera_mask, token_mask), dim=1)
        if layout is None:
            return Prefix(x, mask.cumsum(1) - 1, mask.sum(1), mask)
        order, length, valid = packing(mask)
        positions = torch.arange(x.shape[1], device=self.device)[None]
        return Prefix(packed(x, order), positions, length, valid)

    def prefix_visibility(self, mask: Tensor, count: Tensor) -> Visibility:
        """Every prefix query sees the `count` [B or 1] valid tokens; mask [B or 1, P] bool."""
        layout, slots = self.prefix_layout, mask.shape[1]
        if layout is None:
            return Visibility(mask[:, None, None, :], None)
        if layout.flexible:
            everything = (Segment(0, slots, None),)
            return Visibility(mask[:, None, None, :], everything, Padding(count, slots))
        if layout.all_valid:
            return Visibility(None, (Segment(0, layout.prefix_slots, None),))
        keys = layout.prefix_valid if layout.leading else self.layout_index
        return Visibility(mask[:, None, None, :], (Segment(0, layout.prefix_slots, keys),))

    def suffix_visibility(self, cache: PrefixCache, horizon: int) -> Visibility:
        """The state sees the valid prefix and itself; actions see those and all actions."""
        if self.config.state_tokens == 0:
            return self.seen(cache, None, (Segment(0, horizon, None),), horizon)
        prefix = cache.layers[0].keys.shape[1]
        queries = torch.arange(horizon + 1, device=self.device)
        keys = torch.arange(prefix + horizon + 1, device=self.device)
        mask = (queries[:, None] > 0) | (keys[None, :] <= prefix)
        segments = (Segment(0, 1, prefix + 1), Segment(1, horizon + 1, None))
        return self.seen(cache, mask[None, None], segments, horizon + 1)

    def seen(
        self, cache: PrefixCache, mask: Tensor | None, segments: tuple[Segment, ...], more: int
    ) -> Visibility:
        """What queries see of the prefix, and of `more` keys after it.

        `mask` (broadcastable to [B, 1, S, N + more]) and `segments` say it for a prefix that is
        valid as a whole; `cache.mask` says what of it is.
        """
        if cache.mask is None:
            return Visibility(mask, segments)
        seen = F.pad(cache.mask, (0, more), value=True)[:, None, None, :]
        seen = seen if mask is None else seen & mask
        if self.layout is None:
            return Visibility(seen, None)
        return Visibility(seen, segments, Padding(cache.valid_count, cache.mask.shape[1]))

    def suffix_rope(self, cache: PrefixCache, start: int, stop: int) -> Rope:
        """The rotary tables of the suffix tokens [start, stop), behind the valid prefix."""
        positions = cache.valid_count[:, None] + torch.arange(start, stop, device=self.device)
        return rope_at(positions, self.frequencies, self.dtype)

    def embed_suffix(self, x_t: Tensor, features: Tensor, state: Tensor) -> Tensor:
        """x_t [B, H, A], time features [E], state token [B, 1, E] -> tokens [B, S, E], all float32.

        The tokens of pi05 are the actions; time and state reach it by other ways.
        """
        if self.config.family == "pi05":
            return self.action_in_proj(x_t)
        mixed = self.action_time_mlp_out(F.silu(self.timed(x_t, features)))
        return torch.cat((state, mixed), dim=1)

    def timed(self, x_t: Tensor, features: Tensor) -> Tensor:
        """Actions [B, H, A] and the time [E], as pi0 mixes them -> [B, H, E]."""
        action = self.action_in_proj(x_t)
        features = features.expand_as(action)
        return self.action_time_mlp_in(torch.cat((action, features), dim=-1))

    def embed_state(self, state: Tensor) -> Tensor:
        """State [B, A] -> its token [B, 1, E], float32; pi05 has none, and reads nothing of it."""
        return state if self.config.family == "pi05" else self.state_proj(state)[:, None]

    def modulations(self, features: Tensor) -> Tensor:
        """Time features [E] -> scale, shift and gate of pi05's norms, [M, 3E] float32."""
        assert isinstance(self.expert, AdaptiveTower)
        condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(features))))
        return self.expert.modulations(condition)

    def run_expert(
        self,
        suffix: Tensor,
        features: Tensor,
        how: Attending,
        past: Sequence[Past],
        horizon: int,
    ) -> Tensor:
        """Suffix tokens [B, S, E] at the time of `features` -> normed action tokens [B, H, E]."""
        expert = self.expert
        if isinstance(expert, AdaptiveTower):
            normed, _ = expert(suffix, how, past, self.modulations(features))
            return normed
        hidden, _ = expert(suffix, how, past)
        return expert.norm(hidden[:, -horizon:])

    def denoise_step(
        self, x_t: Tensor, features: Tensor, state: Tensor, cache: PrefixCache
    ) -> Tensor:
        """An Euler step: x_t [B, H, A] -> the next x_t, all float32.

        `features` [E] is the row of `time_table` for this step: a tensor, so that one compiled
        graph serves all steps. state: the token of `embed_state`.
        """
        horizon = x_t.shape[1]
        suffix = self.embed_suffix(x_t, features, state).to(self.dtype)
        stop = self.config.state_tokens + horizon
        rope = self.suffix_rope(cache, stop - suffix.shape[1], stop)
        how = Attending(rope, self.suffix_visibility(cache, horizon), self.ops.attention_denoise)
        hidden = self.run_expert(suffix, features, how, cache.layers, horizon)
        return self.advance(x_t, hidden, features)

    def advance(self, x_t: Tensor, hidden: Tensor, features: Tensor) -> Tensor:
        """What `run_expert` returned at x_t, in the step of `features` -> the next x_t, float32."""
        return x_t + self.dt * self.action_out_proj(hidden.float())

    def sample_actions(self, inputs: Inputs) -> Tensor:
        """A batch of observations -> normalised actions [B, H, A] float32."""
        with record_function("openpi_opt::vision"):
            image_tokens = self.encode_images(inputs.images)
        with record_function("openpi_opt::prefill"):
            cache = self.prefill_of(inputs, image_tokens)
            state = self.embed_state(inputs.state)
        x_t = inputs.noise
        for features in self.time_table.unbind():
            with record_function("openpi_opt::denoise"):
                x_t = self.denoise_step(x_t, features, state, cache)
        return x_t
