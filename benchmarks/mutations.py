"""Wrong policies: each mutation is one mistake that an optimisation could make.

    call = mutation.candidate(policy, previous)
    guard.check(call, inputs, reference, ...)

`previous` are other inputs of the same workload, for mistakes that remember an earlier call.
Mutations patch the instance (stages, ops, layers) for the time of a call and restore it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.ops import (
    SEE_ALL,
    Attention,
    Visibility,
    adaptive_rms_norm,
    eager_attention,
)
from openpi_opt.pi0.policy import Pi0Policy, PrefixCache
from openpi_opt.pi0.schedule import time_features
from openpi_opt.pi0.workload import Workload

STATE_TOKENS = 6  # of a prompt of pi05 in these tests; a robot's state is some 20 to 60

Apply = Callable[[Pi0Policy, Inputs, Inputs], AbstractContextManager[Inputs]]

# Everything that can be got wrong: the third camera is masked, 20 of 28 prompt slots are valid.
WORKLOAD = Workload((True, True, False), 28, 20, horizon=10, steps=10, batch_size=1)


@dataclass(frozen=True)
class Mutation:
    """One mistake; `subtle` ones have a smaller margin, `float32_only` ones none in bfloat16."""

    name: str
    apply: Apply
    subtle: bool = False
    float32_only: bool = False

    def candidate(self, policy: Pi0Policy, previous: Inputs) -> Callable[[Inputs], Tensor]:
        """The mistaken policy, as the guard calls a candidate: inputs -> actions [B, H, A]."""

        def call(inputs: Inputs) -> Tensor:
            with self.apply(policy, inputs, previous) as mutated:
                return policy.sample_actions(mutated)

        return call


@contextmanager
def replaced(owner: object, **values: Any) -> Iterator[None]:
    """Set attributes for the time of the context; those that were not there are deleted again."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(owner, name)
        for name, value in before.items():
            setattr(owner, name, value)


def on_ops(**values: Any) -> Apply:
    """Replace operations of the policy."""

    @contextmanager
    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
        with replaced(policy.ops, **values):
            yield inputs

    return apply


def on_inputs(change: Callable[[Inputs], Inputs]) -> Apply:
    """Give the policy other inputs."""

    @contextmanager
    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
        yield change(inputs)

    return apply


def on_cache(change: Callable[[PrefixCache], PrefixCache]) -> Apply:
    """Change what the prefill hands to the denoising steps."""

    @contextmanager
    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
        prefill = policy.prefill
        with replaced(policy, prefill=lambda *args: change(prefill(*args))):
            yield inputs

    return apply


def on_actions(change: Callable[[Tensor], Tensor]) -> Apply:
    """Change the actions [B, H, A]."""

    @contextmanager
    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
        sample = policy.sample_actions
        with replaced(policy, sample_actions=lambda given: change(sample(given))):
            yield inputs

    return apply


def replayed(which: int) -> Callable[[Tensor], Tensor]:
    """Actions of an earlier call: 0 the first one's, -2 the last one's. The first call is right."""
    kept: list[Tensor] = []

    def change(actions: Tensor) -> Tensor:
        kept.append(actions)
        return kept[max(which, -len(kept))]

    return change


def skipped_layer(tower: str, index: int) -> Apply:
    """The layer hands its input on (its keys and values are still computed)."""

    @contextmanager
    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
        if tower == "vision":
            layer = policy.vision.encoder.layers[index]
            with replaced(layer, forward=lambda x: x):
                yield inputs
        else:
            layer = getattr(policy, tower).layers[index]
            forward = layer.forward
            with replaced(layer, forward=lambda x, *rest: (x, forward(x, *rest)[1])):
                yield inputs

    return apply


def stale_layer(index: int) -> Apply:
    """Keys and values of one layer are those of an earlier call."""

    @contextmanager
    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
        prefill = policy.prefill
        old = prefill(
            policy.encode_images(previous.images),
            previous.tokens,
            previous.image_mask,
            previous.token_mask,
        )

        def mixed(*args: Tensor) -> PrefixCache:
            cache = prefill(*args)
            layers = list(cache.layers)
            layers[index] = old.layers[index]
            return cache._replace(layers=layers)

        with replaced(policy, prefill=mixed):
            yield inputs

    return apply


@contextmanager
def time_reversed(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
    """The time features of the steps in the opposite order."""
    with replaced_table(policy, policy.time_table.flip(0), policy.steps):
        yield inputs


@contextmanager
def last_step_left_out(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
    """The integration ends one step before time 0."""
    with replaced_table(policy, policy.time_table[:-1], policy.steps):
        yield inputs


@contextmanager
def one_step_fewer(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
    """A schedule of one step less that still reaches time 0."""
    steps = policy.steps - 1
    table = time_features(steps, policy.config.expert.width).to(policy.device)
    with replaced_table(policy, table, steps):
        yield inputs


@contextmanager
def replaced_table(policy: Pi0Policy, table: Tensor, steps: int) -> Iterator[None]:
    """Other time features [steps, E], and another step size."""
    table_before, steps_before = policy.time_table, policy.steps
    policy.time_table, policy.steps = table, steps
    try:
        yield
    finally:
        policy.time_table, policy.steps = table_before, steps_before


def unmasked(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
    """Every query sees every key."""
    return eager_attention(q, k, v, SEE_ALL, scale)


def causal(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
    """What `is_causal=True` means for fewer queries than keys: query i sees keys 0..i."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    return eager_attention(q, k, v, Visibility(mask[None, None], None), scale)


def without_state_key(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float
) -> Tensor:
    """Actions do not see the state token, which is the first of the suffix."""
    assert visibility.mask is not None
    mask = visibility.mask.clone()
    mask[:, :, 1:, k.shape[1] - q.shape[1]] = False
    return eager_attention(q, k, v, Visibility(mask, None), scale)


def scaled(factor: float) -> Attention:
    """Logits scaled by `factor` too much."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        return eager_attention(q, k, v, visibility, factor * scale)

    return attention


def rotary_backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The two halves change places: a rotation by the negative angle."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def rotary_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbours instead of halves."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def rms_norm_without_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gain read as w instead of 1 + w."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def adaptive_rms_norm_without_one(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Scale read as s instead of 1 + s."""
    return adaptive_rms_norm(x, scale - 1.0, shift, eps)


def on_modulations(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Apply:
    """Scale, shift and gate of all norms, [M, W] each, are changed before they are used."""

    @contextmanager
    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
        right = policy.modulations

        def wrong(features: Tensor) -> Tensor:
            return torch.cat(change(*right(features).chunk(3, dim=-1)), dim=-1)

        with replaced(policy, modulations=wrong):
            yield inputs

    return apply


@contextmanager
def condition_stale(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
    """From the second step on the time is that of the step before."""
    table = torch.cat((policy.time_table[:1], policy.time_table[:-1]))
    with replaced_table(policy, table, policy.steps):
        yield inputs


def state_in_prompt(inputs: Inputs) -> Tensor:
    """[B, L]: the last STATE_TOKENS valid tokens, taken for those that pi05's state becomes."""
    left = inputs.token_mask.flip(1).cumsum(1).flip(1)
    return inputs.token_mask & (left <= STATE_TOKENS)


def without_state_in_prompt(inputs: Inputs) -> Inputs:
    """The tokens that say the state count as padding."""
    return inputs._replace(token_mask=inputs.token_mask & ~state_in_prompt(inputs))


@contextmanager
def stale_state_in_prompt(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
    """The state is that of the call before."""
    tokens = torch.where(state_in_prompt(inputs), previous.tokens, inputs.tokens)
    yield inputs._replace(tokens=tokens)


def all_tokens(inputs: Inputs) -> Inputs:
    """Padding counts as prompt."""
    return inputs._replace(token_mask=torch.ones_like(inputs.token_mask))


def all_cameras(inputs: Inputs) -> Inputs:
    """Masked cameras count as active."""
    return inputs._replace(image_mask=torch.ones_like(inputs.image_mask))


def without_camera(index: int) -> Callable[[Inputs], Inputs]:
    """An active camera counts as masked."""

    def change(inputs: Inputs) -> Inputs:
        mask = inputs.image_mask.clone()
        mask[:, index] = False
        return inputs._replace(image_mask=mask)

    return change


def visible(start: int, stop: int) -> Callable[[PrefixCache], PrefixCache]:
    """Prefix keys [start, stop) become visible to the suffix; positions stay."""

    def change(cache: PrefixCache) -> PrefixCache:
        assert cache.mask is not None
        mask = cache.mask.clone()
        mask[:, start:stop] = True
        return cache._replace(mask=mask)

    return change


def _attention(function: Attention, *stages: str) -> Apply:
    return on_ops(**{f"attention_{stage}": function for stage in stages})


def catalogue(policy: Pi0Policy, workload: Workload = WORKLOAD) -> list[Mutation]:
    """All mutations, each with a state of its own, for a policy without declared layout.

    `workload` has a masked last camera and padding after its prompt. Layers are skipped at the
    first, middle and last place that can matter.
    """
    config = policy.config
    depth, last = config.language.depth, config.language.depth - 1
    prompt = len(workload.active_cameras) * config.vision.tokens
    masked, slots = prompt - config.vision.tokens, prompt + workload.prompt_slots
    mutations = [
        Mutation("mask dropped", _attention(unmasked, "prefill", "denoise")),
        Mutation("mask dropped in prefill", _attention(unmasked, "prefill")),
        Mutation("mask dropped in denoise", _attention(unmasked, "denoise")),
        Mutation("is_causal misuse", _attention(causal, "denoise")),
        Mutation("is_causal in prefill", _attention(causal, "prefill")),
        Mutation("masked camera attended", on_inputs(all_cameras)),
        Mutation("masked camera attended in denoise", on_cache(visible(masked, prompt))),
        Mutation("padding attended", on_inputs(all_tokens)),
        Mutation("padding attended in denoise", on_cache(visible(prompt, slots))),
        Mutation("camera 0 skipped", on_inputs(without_camera(0))),
        Mutation("camera 1 skipped", on_inputs(without_camera(1))),
        Mutation(
            "suffix positions +1",
            on_cache(lambda cache: cache._replace(valid_count=cache.valid_count + 1)),
        ),
        Mutation("rotary halves swapped", on_ops(rotary=rotary_backwards)),
        Mutation("rotary interleaved", on_ops(rotary=rotary_interleaved)),
        Mutation("last step left out", last_step_left_out),
        Mutation("time reversed", time_reversed),
        Mutation("norm weight as w", on_ops(rms_norm=rms_norm_without_one)),
        Mutation(
            "prompt rolled by one",
            on_inputs(lambda inputs: inputs._replace(tokens=inputs.tokens.roll(1, dims=1))),
        ),
    ]
    mutations += _of_pi05() if config.family == "pi05" else _of_pi0()
    mutations += [
        # The last but one language layer is subtle: only the keys of the last one depend on it.
        Mutation(f"{tower} layer {index} skipped", skipped_layer(tower, index), index in subtle)
        for tower, indices, subtle in (
            ("vision", (0, config.vision.depth // 2, config.vision.depth - 1), ()),
            ("language", (0, depth // 2 - 1, last - 1), (last - 1,)),
            ("expert", (0, depth // 2, last), ()),
        )
        for index in indices
    ]
    mutations += [
        Mutation(f"K/V of layer {index} stale", stale_layer(index))
        for index in (0, depth // 2, last)
    ]
    everywhere = ("vision", "prefill", "denoise")
    mutations += [
        Mutation("one step fewer, rescheduled", one_step_fewer, subtle=True),
        Mutation("scale +5%", _attention(scaled(1.05), *everywhere), subtle=True),
        Mutation("scale -5%", _attention(scaled(0.95), *everywhere), subtle=True),
        *(
            # In the vision tower alone it is near the tolerance of bfloat16 for some seeds.
            Mutation(
                f"scale +5% in {stage}", _attention(scaled(1.05), stage), True, stage == "vision"
            )
            for stage in everywhere
        ),
        Mutation(
            "erf GELU",
            on_ops(gelu=F.gelu, gelu_mul=lambda gate, up: F.gelu(gate) * up),
            subtle=True,
            float32_only=True,
        ),
        Mutation("NaN", on_actions(lambda actions: actions * torch.nan)),
        Mutation("zeros", on_actions(torch.zeros_like)),
        Mutation("first call's output again", on_actions(replayed(0))),
        Mutation("last call's output again", on_actions(replayed(-2))),
    ]
    return mutations


def _of_pi0() -> list[Mutation]:
    return [
        Mutation("state token left out", _attention(without_state_key, "denoise")),
        Mutation(
            "state ignored",
            on_inputs(lambda inputs: inputs._replace(state=torch.zeros_like(inputs.state))),
        ),
    ]


def _of_pi05() -> list[Mutation]:
    return [
        Mutation(
            "gates dropped",
            on_modulations(lambda scale, shift, gate: (scale, shift, torch.ones_like(gate))),
        ),
        Mutation(
            "shifts dropped",
            on_modulations(lambda scale, shift, gate: (scale, torch.zeros_like(shift), gate)),
        ),
        Mutation(
            "scale and shift swapped",
            on_modulations(lambda scale, shift, gate: (shift, scale, gate)),
        ),
        Mutation(
            "modulations of the next norm",
            on_modulations(lambda *parts: tuple(part.roll(-1, dims=0) for part in parts)),
        ),
        Mutation("scale as s", on_ops(adaptive_rms_norm=adaptive_rms_norm_without_one)),
        Mutation("condition stale by one step", condition_stale),
        Mutation("state in the prompt left out", on_inputs(without_state_in_prompt)),
        Mutation("state in the prompt stale", stale_state_in_prompt),
    ]


def distance(actions: Tensor, reference: Tensor) -> float:
    """Relative L2 distance in float64; infinite where `actions` is not finite."""
    wide = actions.double()
    if not bool(wide.isfinite().all()):
        return float("inf")
    return float((wide - reference.double()).norm() / reference.double().norm())
