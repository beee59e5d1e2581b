"""The policy's stages without the work that a known layout and fixed time steps make needless.

Letters: B batch, C cameras, L prompt slots, N valid prefix tokens, H horizon, A action dim, W
language width, E expert width, D head dim.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpi_opt.pi0.adaptive import AdaptiveTower
from openpi_opt.pi0.gemma import Attending, GemmaTower, Past, Rope
from openpi_opt.pi0.inputs import Layout
from openpi_opt.pi0.ops import Segment, Visibility
from openpi_opt.pi0.policy import Pi0Policy, PrefixCache
from openpi_opt.pi0.schedule import time_features
from openpi_opt.surgery.layers import BufferedKeysValues, gemma_layers, keys_values, with_room


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


class LeanPolicy(Pi0Policy):
    """A `Pi0Policy` that follows a `Plan`; `lean` makes one of a policy in place."""

    plan: Plan
    slots: int
    prefix_cos: Tensor
    prefix_sin: Tensor
    cos: Tensor
    sin: Tensor
    suffix_mask: Tensor
    action_weight: Tensor
    modulation_table: Tensor

    _prefix_layout: Layout | None = None

    @property
    def prefix_layout(self) -> Layout | None:
        """Without what is skipped."""
        return self._prefix_layout

    def derive(self) -> None:
        """As in `Pi0Policy`, and the constants of the plan for this layout, dtype and weights."""
        # Kept, since compiled stages read it: Dynamo would have to trace how it is made.
        layout = self.layout
        if layout is not None and self.plan.skip_masked:
            cameras, tokens = (True,) * sum(layout.cameras), layout.prompt_tokens
            layout = dataclasses.replace(layout, cameras=cameras, prompt_slots=tokens)
        self._prefix_layout = layout
        super().derive()
        if self.plan.time_mlp:
            if self.config.family == "pi0":
                self._fold_time()
            else:
                assert isinstance(self.expert, AdaptiveTower)
                self.time_table = self.expert.constants(self.modulation_table)
        if not self.plan.fixed_layout:
            return
        horizon, states = self.plan.horizon, self.config.state_tokens
        if layout is None or horizon < 1:
            raise ValueError(
                f"{self.plan} needs a declared layout and a horizon: batches of one kind, with "
                "the same masks in every element. Leave these simplifications out for others."
            )
        if self.plan.state_once and not states:
            raise ValueError(f"{self.plan}: {self.config.name} has no state token to run once.")
        # N: what is behind a length that only the device knows stays.
        self.slots = valid = layout.prefix_slots if layout.flexible else layout.prefix_valid
        positions = torch.arange(valid + states + horizon, device=self.device)[None]
        prefix = positions[:, :valid] if layout.flexible else self.layout_positions
        mask = (positions[0, valid:, None] > valid) | (positions <= valid)
        tables = (*super().prefix_rope(prefix), *super().prefix_rope(positions), mask[None, None])
        for name, value in zip(
            ("prefix_cos", "prefix_sin", "cos", "sin", "suffix_mask"), tables, strict=True
        ):
            self.register_buffer(name, value, persistent=False)

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
        state: Tensor,
    ) -> PrefixCache:
        """As in `Pi0Policy`; with `state_once` the cache holds the state [B, A], too."""
        plan = self.plan
        if plan.skip_masked:
            assert self.layout is not None
            tokens = tokens[:, : self.layout.prompt_tokens]
            image_mask = self._active(image_mask)
        cache = super().prefill(image_tokens, tokens, image_mask, token_mask, state)
        # Not `_replace`, here and below: Dynamo of torch 2.11 cannot return what that makes.
        if plan.kv_buffer:
            rows = self.config.state_tokens + plan.horizon
            buffers = [with_room(layer, rows) for layer in cache.layers]
            cache = PrefixCache(buffers, cache.valid_count, cache.mask)
        layers = self._with_state(cache, state) if plan.state_once else cache.layers
        rope = None
        if plan.rope_tables and self.layout is not None and self.layout.flexible:
            stop = self.config.state_tokens + plan.horizon
            rope = self.suffix_rope(cache, int(plan.state_once), stop)
        return PrefixCache(layers, cache.valid_count, cache.mask, rope)

    def prefix_rope(self, positions: Tensor) -> Rope:
        """As in `Pi0Policy`, from the table."""
        if not self.plan.rope_tables:
            return super().prefix_rope(positions)
        return Rope(self.prefix_cos, self.prefix_sin)

    def suffix_rope(self, cache: PrefixCache, start: int, stop: int) -> Rope:
        """As in `Pi0Policy`, from the table; in a flexible layout once a call."""
        if cache.rope is not None:
            return cache.rope
        if not self.plan.rope_tables:
            return super().suffix_rope(cache, start, stop)
        assert self.layout is not None
        if not self.layout.flexible:
            rows = slice(self.slots + start, self.slots + stop)
            return Rope(self.cos[:, rows], self.sin[:, rows])
        positions = cache.valid_count[:, None] + torch.arange(start, stop, device=self.device)
        return Rope(self.cos[0, positions], self.sin[0, positions])

    def _with_state(self, cache: PrefixCache, state: Tensor) -> list[Past]:
        """Append the state's keys and values to each layer's; its last layer needs no more.

        It sees the prefix and itself, and nothing in it depends on time or actions.
        """
        x = self.state_proj(state)[:, None].to(self.dtype)
        itself = self.seen(cache, None, (Segment(0, 1, None),), 1)
        rope = self.suffix_rope(cache, 0, 1)
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
            hidden = self.timed(x_t, features)
        mixed = self.action_time_mlp_out(F.silu(hidden))
        return mixed if plan.state_once else torch.cat((state, mixed), dim=1)

    def suffix_visibility(self, cache: PrefixCache, horizon: int) -> Visibility:
        """As in `Pi0Policy`; without a state among them, tokens see all there is.

        Raises ValueError: a layout's constants are for another horizon.
        """
        plan, states = self.plan, self.config.state_tokens
        if not plan.fixed_layout:
            return super().suffix_visibility(cache, horizon)
        if horizon != plan.horizon:
            raise ValueError(f"The horizon is {horizon}; this policy was built for {plan.horizon}.")
        if plan.state_once or not states:
            return self.seen(cache, None, (Segment(0, horizon, None),), states + horizon)
        segments = (Segment(0, 1, self.slots + 1), Segment(1, horizon + 1, None))
        return self.seen(cache, self.suffix_mask, segments, 1 + horizon)


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
