"""The policy's stages without the work that a known layout and fixed time steps make needless.

Letters: B batch, C cameras, L prompt slots, N valid prefix tokens, H horizon, A action dim, W
language width, E expert width, D head dim.
"""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpi_opt.pi0.adaptive import AdaptiveTower
from openpi_opt.pi0.gemma import Attending, GemmaTower, KeysValues, Past, Rope, rope_at
from openpi_opt.pi0.inputs import Inputs, Layout
from openpi_opt.pi0.ops import Segment, Visibility
from openpi_opt.pi0.policy import Pi0Policy, PrefixCache
from openpi_opt.pi0.schedule import time_features
from openpi_opt.surgery.buffer import BufferedKeysValues, with_room
from openpi_opt.surgery.last_layer import keys_values
from openpi_opt.surgery.towers import gemma_layers


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done differently from `Pi0Policy`; every combination is allowed."""

    horizon: int = 0
    """H of every call; needed by the fields that need a layout"""
    separate_cameras: bool = False
    """one vision pass for each camera instead of one for all"""
    skip_masked: bool = False
    """encode and prefill valid tokens only; needs a layout. A flexible one says which
    cameras never come; these are left out"""
    time_mlp: bool = False
    """pi0: fold the time features and `action_in_proj` into `action_time_mlp_in`;
    pi05: compute the modulations of all norms once for each step"""
    state_once: bool = False
    """run the state token once and keep its keys and values; needs a layout, and a
    model that has one"""
    kv_buffer: bool = False
    """write a step's keys and values behind the prefix's in place; needs a layout"""
    rope_tables: bool = False
    """keep the rotary tables of prefix and suffix; needs a layout. In a flexible layout
    the suffix's rows are looked up once a call"""

    @property
    def fixed_layout(self) -> bool:
        """Whether the stages are built for one layout and horizon."""
        return self.skip_masked or self.state_once or self.kv_buffer or self.rope_tables


class FixedRope(nn.Module):
    """The rotary tables of positions [1, S] that never change, stored or computed each time."""

    positions: Tensor
    frequencies: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, positions: Tensor, policy: Pi0Policy, stored: bool) -> None:
        super().__init__()
        self.stored = stored
        self.dtype = policy.dtype
        rope = rope_at(positions, policy.frequencies, policy.dtype)
        for name, value in (
            ("positions", positions),
            ("frequencies", policy.frequencies),
            ("cos", rope.cos),
            ("sin", rope.sin),
        ):
            self.register_buffer(name, value, persistent=False)

    def forward(self, start: int = 0, stop: int | None = None) -> Rope:
        """Cosines and sines [1, S, D/2], or the rows [start, stop) of them."""
        rows = slice(start, stop)
        if self.stored:
            return Rope(self.cos[:, rows], self.sin[:, rows])
        return rope_at(self.positions[:, rows], self.frequencies, self.dtype)

    def at(self, positions: Tensor) -> Rope:
        """Of these positions [B, S] among the table's, which begins at 0."""
        if self.stored:
            return Rope(self.cos[0, positions], self.sin[0, positions])
        return rope_at(positions, self.frequencies, self.dtype)


class LeanPolicy(Pi0Policy):
    """A `Pi0Policy` that follows a `Plan`; `lean` makes one of a policy in place."""

    plan: Plan
    prefix_rope: FixedRope
    rope: FixedRope
    slots: int
    suffix_mask: Tensor
    action_weight: Tensor
    modulation_table: Tensor

    def fill_buffers(self) -> None:
        """As in `Pi0Policy`, and compute anew what the plan replaces."""
        super().fill_buffers()
        self.derive()

    def declare_layout(self, layout: Layout | None) -> None:
        """As in `Pi0Policy`, and compute anew what follows from the layout."""
        super().declare_layout(layout)
        self.derive()

    def derive(self) -> None:
        """Compute the constants of the plan for the present layout, dtype and weights."""
        if self.plan.time_mlp:
            if self.config.family == "pi0":
                self._fold_time()
            else:
                assert isinstance(self.expert, AdaptiveTower)
                self.time_table = self.expert.constants(self.modulation_table)
        if not self.plan.fixed_layout:
            return
        layout, horizon = self.layout, self.plan.horizon
        if layout is None or horizon < 1:
            raise ValueError(
                f"{self.plan} needs a declared layout and a horizon: batches of one kind, with "
                "the same masks in every element. Leave these simplifications out for others."
            )
        stored = self.plan.rope_tables
        # N: what is not skipped, or is behind a length that only the device knows, stays.
        kept = layout.flexible and not self.plan.skip_masked
        self.slots = valid = layout.prefix_slots if kept else layout.prefix_valid
        states = self.config.state_tokens
        if self.plan.state_once and not states:
            raise ValueError(f"{self.plan}: {self.config.name} has no state token to run once.")
        positions = torch.arange(valid + states + horizon, device=self.device)[None]
        packed = self.plan.skip_masked or layout.flexible
        prefix = positions[:, :valid] if packed else self.layout_positions
        self.prefix_rope = FixedRope(prefix, self, stored)
        self.rope = FixedRope(positions, self, stored)
        mask = (positions[0, valid:, None] > valid) | (positions <= valid)
        self.register_buffer("suffix_mask", mask[None, None], persistent=False)

    def _fold_time(self) -> None:
        """Split action_time_mlp_in in two halves: W_a W_in [E, A], and per step W_t phi + biases.

        In float64, rounded once.
        """
        into, mlp = self.action_in_proj, self.action_time_mlp_in
        width = into.out_features
        action_half, time_half = mlp.weight.double().split(width, dim=1)
        features = time_features(self.steps, width).to(self.device).double()
        bias = mlp.bias.double() + action_half @ into.bias.double()
        weight = action_half @ into.weight.double()
        self.register_buffer("action_weight", weight.float(), persistent=False)
        table = features @ time_half.T + bias
        self.register_buffer("time_table", table.float(), persistent=False)

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, C, 3, 224, 224] -> image tokens [B, C*256, W] of all, or of the active, cameras."""
        if self.plan.skip_masked:
            images = self._active(images)
        if not self.plan.separate_cameras:
            return super().encode_images(images)
        encode = super().encode_images
        return torch.cat([encode(image) for image in images.split(1, dim=1)], dim=1)

    def _active(self, images: Tensor) -> Tensor:
        """[B, C, ...] of the cameras that the layout says are active; a view where it can be."""
        assert self.layout is not None
        cameras = [index for index, active in enumerate(self.layout.cameras) if active]
        first, last = cameras[0], cameras[-1]
        if last - first + 1 == len(cameras):
            return images[:, first : last + 1]
        return torch.stack([images[:, camera] for camera in cameras], dim=1)

    def prefill(
        self,
        image_tokens: Tensor,
        tokens: Tensor,
        image_mask: Tensor,
        token_mask: Tensor,
        state: Tensor | None = None,
    ) -> PrefixCache:
        """As in `Pi0Policy`; with `state_once` the cache holds the state [B, A], too.

        The masks are read in a flexible layout only; another one says what they are.
        """
        if not self.plan.fixed_layout:
            return super().prefill(image_tokens, tokens, image_mask, token_mask)
        assert self.layout is not None
        if self.plan.skip_masked:
            tokens = tokens[:, : self.layout.prompt_tokens]
            image_mask = self._active(image_mask)
        x = torch.cat((image_tokens, self.embed_prompt(tokens)), dim=1)
        x, _, count, mask = self.arrange(x, image_mask, token_mask)
        visibility = self.prefix_visibility(mask, count)
        how = Attending(self.prefix_rope(), visibility, self.ops.attention_prefill)
        _, own = self.language(x, how)
        if not (self.layout.flexible or self.plan.skip_masked or self.layout.all_valid):
            index = self.layout_index
            own = [
                KeysValues(c.keys.index_select(1, index), c.values.index_select(1, index))
                for c in own
            ]
        caches: Sequence[Past] = own
        if self.plan.kv_buffer:
            rows = self.config.state_tokens + self.plan.horizon
            caches = [with_room(cache, rows) for cache in own]
        cache = PrefixCache(caches, count, mask if self.layout.flexible else None)
        if self.plan.state_once:
            assert state is not None
            caches = self._with_state(cache, state)
        looked_up = self.layout.flexible and self.plan.rope_tables
        rope = self._rope_after(count, self.plan.state_once) if looked_up else None
        return PrefixCache(caches, count, cache.mask, rope)

    def prefill_of(self, inputs: Inputs, image_tokens: Tensor) -> PrefixCache:
        """As in `Pi0Policy`; a state token that is run once belongs to the prefill."""
        if not self.plan.state_once:
            return super().prefill_of(inputs, image_tokens)
        return self.prefill(
            image_tokens, inputs.tokens, inputs.image_mask, inputs.token_mask, inputs.state
        )

    def prefix_visibility(self, mask: Tensor, count: Tensor) -> Visibility:
        """Without masked tokens every query sees every key."""
        if not self.plan.skip_masked or self.layout is None or self.layout.flexible:
            return super().prefix_visibility(mask, count)
        return Visibility(None, (Segment(0, self.layout.prefix_valid, None),))

    def _rope_after(self, count: Tensor, start: int, stop: int | None = None) -> Rope:
        """Rotary tables of the suffix tokens [start, stop), the first of which follows `count`."""
        assert self.layout is not None
        total = self.config.state_tokens + self.plan.horizon
        stop = total if stop is None else stop
        if not self.layout.flexible:
            return self.rope(self.slots + start, self.slots + stop)
        return self.rope.at(count[:, None] + torch.arange(start, stop, device=self.device))

    def _with_state(self, cache: PrefixCache, state: Tensor) -> list[Past]:
        """Append the state's keys and values to each layer's; its last layer needs no more.

        It sees the prefix and itself, and nothing in it depends on time or actions.
        """
        x = self.state_proj(state)[:, None].to(self.dtype)
        itself = self._seen(cache, None, (Segment(0, 1, None),), 1)
        rope = self._rope_after(cache.valid_count, 0, 1)
        how = Attending(rope, itself, self.ops.attention_denoise)
        caches = cache.layers
        assert isinstance(self.expert, GemmaTower)
        *layers, last = gemma_layers(self.expert)
        joined: list[Past] = []
        for layer, past in zip(layers, caches[:-1], strict=True):
            x, own = layer(x, how, past)
            joined.append(own)
        k, v = keys_values(last, last.input_layernorm(x))
        joined.append(caches[-1].joined(self.ops.rotary(k, *how.rope), v))
        # Not `_replace`: Dynamo of torch 2.11 cannot return what that makes.
        buffered = [past for past in caches if isinstance(past, BufferedKeysValues)]
        return [BufferedKeysValues(p.keys, p.values, p.filled + 1) for p in buffered] or joined

    def embed_state(self, state: Tensor) -> Tensor:
        """As in `Pi0Policy`; no step reads a state whose token was run once."""
        return state if self.plan.state_once else super().embed_state(state)

    def modulations(self, features: Tensor) -> Tensor:
        """As in `Pi0Policy`; `features` are a row of `time_table`, whatever that holds."""
        return features if self.plan.time_mlp else super().modulations(features)

    def embed_suffix(self, x_t: Tensor, features: Tensor, state: Tensor) -> Tensor:
        """As in `Pi0Policy`; `features` [E] are a row of `time_table`, whatever that holds."""
        plan = self.plan
        if self.config.family == "pi05" or not (plan.time_mlp or plan.state_once):
            return super().embed_suffix(x_t, features, state)
        if plan.time_mlp:
            hidden = F.linear(x_t, self.action_weight, features)
        else:
            action = self.action_in_proj(x_t)
            timed = torch.cat((action, features.expand_as(action)), dim=-1)
            hidden = self.action_time_mlp_in(timed)
        mixed = self.action_time_mlp_out(F.silu(hidden))
        if plan.state_once:
            return mixed
        return torch.cat((state, mixed), dim=1)

    def denoise_step(
        self, x_t: Tensor, features: Tensor, state: Tensor, cache: PrefixCache
    ) -> Tensor:
        """As in `Pi0Policy`, with the constants of the layout."""
        plan = self.plan
        if not plan.fixed_layout:
            return super().denoise_step(x_t, features, state, cache)
        if x_t.shape[1] != plan.horizon:
            raise ValueError(
                f"The horizon is {x_t.shape[1]}; this policy was built for {plan.horizon}."
            )
        suffix = self.embed_suffix(x_t, features, state).to(self.dtype)
        rope = cache.rope
        if rope is None:
            rope = self._rope_after(cache.valid_count, plan.state_once)
        visibility = self._suffix_visibility(cache)
        how = Attending(rope, visibility, self.ops.attention_denoise)
        hidden = self.run_expert(suffix, features, how, cache.layers, plan.horizon)
        return self.advance(x_t, hidden, features)

    def _suffix_visibility(self, cache: PrefixCache) -> Visibility:
        """As `suffix_visibility`; without a state among them, tokens see all there is."""
        horizon, states = self.plan.horizon, self.config.state_tokens
        if self.plan.state_once or not states:
            return self._seen(cache, None, (Segment(0, horizon, None),), states + horizon)
        segments = (Segment(0, 1, self.slots + 1), Segment(1, horizon + 1, None))
        return self._seen(cache, self.suffix_mask, segments, 1 + horizon)

    def _seen(
        self, cache: PrefixCache, mask: Tensor | None, segments: tuple[Segment, ...], more: int
    ) -> Visibility:
        """`padded_visibility` where there is padding."""
        if cache.mask is None:
            return Visibility(mask, segments)
        return self.padded_visibility(cache, mask, segments, more)


def tabulate_modulations(policy: Pi0Policy) -> None:
    """Compute the modulations of pi05's norms for every step, unless that was done.

    In float64, from the weights as they are, rounded once -> the buffer `modulation_table`
    [steps, M, 3E] float32. Called before the cast, the table holds no rounded weight.
    """
    if hasattr(policy, "modulation_table"):
        return
    assert isinstance(policy.expert, AdaptiveTower)
    x = time_features(policy.steps, policy.config.expert.width).to(policy.device).double()
    for linear in (policy.time_mlp_in, policy.time_mlp_out):
        x = F.silu(_wide(linear, x))
    rows = torch.stack([_wide(norm.dense, x) for norm in policy.expert.norms()], dim=1)
    policy.register_buffer("modulation_table", rows.float(), persistent=False)


def _wide(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear` in float64."""
    return F.linear(x, linear.weight.double(), linear.bias.double())


def lean(policy: Pi0Policy, **changes: int | bool) -> None:
    """Add `changes` to the plan of `policy`, which becomes a `LeanPolicy` in place.

    Raises ValueError when a change needs a layout and none is declared.
    """
    plan = policy.plan if isinstance(policy, LeanPolicy) else Plan()
    policy.__class__ = LeanPolicy
    assert isinstance(policy, LeanPolicy)
    policy.plan = dataclasses.replace(plan, **changes)  # type: ignore[arg-type]
    if policy.plan.time_mlp and policy.config.family == "pi05":
        tabulate_modulations(policy)
    policy.derive()
