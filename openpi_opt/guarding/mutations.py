"""Wrong policies: each mutation is one mistake that an optimisation could make.

    call = mutation.candidate(policy, previous)
    guard.check(call, inputs, reference, ...)

`previous` are other inputs of the same workload, for mistakes that remember an earlier call.
Mutations patch the instance (stages, ops, layers) for the time of a call and restore it. What a
mistake remembers of earlier calls begins anew with each catalogue.

No mutation is what rounding in float32 hides, for instance a softmax whose sums have another order.

Letters: B batch, S queries, T keys, Hq query heads, Hkv key/value heads, D head dim, W width,
C cameras, L prompt slots, H horizon, A action dim.
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
    NOT_ALLOWED,
    SEE_ALL,
    Attention,
    Visibility,
    adaptive_rms_norm,
    eager_attention,
    rms_norm,
)
from openpi_opt.pi0.policy import Pi0Policy, PrefixCache
from openpi_opt.pi0.schedule import time_features
from openpi_opt.pi0.workload import Workload

STATE_TOKENS = 6  # of a prompt of pi05 here; a robot's state is some 20 to 60
# Thresholds that shortcuts of the field use, or could.
LITTLE_FRAME, LITTLE_VELOCITY = 0.02, 0.05
INT8_LEVELS = 127.0

Apply = Callable[[Pi0Policy, Inputs, Inputs], AbstractContextManager[Inputs]]


@dataclass(frozen=True)
class Mutation:
    """One mistake. `batch` is the least batch size in which it is one."""

    name: str
    apply: Apply
    batch: int = 1

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


def on_rotary(rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Apply:
    """Replace the rotary embedding, of one tensor and of queries and keys together."""

    def both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(q, cos, sin), rotate(k, cos, sin)

    return on_ops(rotary=rotate, rotary_qk=both)


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


def state_sees_actions(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float
) -> Tensor:
    """The state token, the first of the suffix, sees the actions as they see it."""
    assert visibility.mask is not None
    mask = visibility.mask.clone()
    mask[:, :, :1] = mask[:, :, 1:2]
    return eager_attention(q, k, v, Visibility(mask, None), scale)


def padded_keys(multiple: int) -> Attention:
    """Keys and values are padded with zeros to a multiple, and nothing masks them."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        more = -k.shape[1] % multiple or multiple
        k, v = (F.pad(tensor, (0, 0, 0, 0, 0, more)) for tensor in (k, v))
        mask = visibility.mask
        if mask is not None:
            mask = F.pad(mask, (0, more), value=True)
        return eager_attention(q, k, v, Visibility(mask, None), scale)

    return attention


def dropped_key(index: int) -> Attention:
    """One key is seen by no query: off by one at an end."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        mask = torch.ones(1, 1, 1, k.shape[1], dtype=torch.bool, device=q.device)
        mask[..., index] = False
        if visibility.mask is not None:
            mask = mask & visibility.mask
        return eager_attention(q, k, v, Visibility(mask, None), scale)

    return attention


def _soft(
    q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Callable[[Tensor], Tensor]
) -> Tensor:
    """Attention whose weights [B, Hq, S, T] are `weights` of the float32 logits."""
    heads = q.shape[2]
    keys, values = (tensor.transpose(1, 2).expand(-1, heads, -1, -1) for tensor in (k, v))
    logits = (q.transpose(1, 2) @ keys.transpose(2, 3) * scale).float()
    return (weights(logits).to(q.dtype) @ values).transpose(1, 2)


def weakly_masked(value: float) -> Attention:
    """Masked logits get `value` added instead of minus infinity."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        def weights(logits: Tensor) -> Tensor:
            if visibility.mask is None:
                return logits.softmax(-1)
            return (logits + value * ~visibility.mask).softmax(-1)

        return _soft(q, k, v, scale, weights)

    return attention


def with_logits(change: Callable[[Tensor], Tensor]) -> Attention:
    """The logits are changed before the softmax."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        def weights(logits: Tensor) -> Tensor:
            return _masked(change(logits), visibility).softmax(-1)

        return _soft(q, k, v, scale, weights)

    return attention


def with_weights(change: Callable[[Tensor], Tensor]) -> Attention:
    """The softmax is replaced: `change` gets masked float32 logits and returns the weights."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        return _soft(q, k, v, scale, lambda logits: change(_masked(logits, visibility)))

    return attention


def _masked(logits: Tensor, visibility: Visibility) -> Tensor:
    mask = visibility.mask
    return logits if mask is None else logits.masked_fill(~mask, NOT_ALLOWED)


def unshifted_softmax(logits: Tensor) -> Tensor:
    """The maximum is not subtracted."""
    shares = logits.exp()
    return shares / shares.sum(-1, keepdim=True)


def strongest(count: int) -> Callable[[Tensor], Tensor]:
    """Only the largest logits count: sparse attention."""

    def weights(logits: Tensor) -> Tensor:
        least = logits.topk(min(count, logits.shape[-1]), dim=-1).values[..., -1:]
        return logits.masked_fill(logits < least, NOT_ALLOWED).softmax(-1)

    return weights


def int8(x: Tensor, dim: int) -> Tensor:
    """`x` rounded to 8 bits, one scale for each vector along `dim`."""
    scale = x.abs().amax(dim, keepdim=True).clamp_min(1e-12) / INT8_LEVELS
    return (x / scale).round().mul(scale).to(x.dtype)


def int8_keys_values(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float
) -> Tensor:
    """Keys and values are kept in 8 bits."""
    return eager_attention(q, int8(k, -1), int8(v, -1), visibility, scale)


def int8_weights(tower: str) -> Apply:
    """All weights of a tower are kept in 8 bits, one scale for each output."""

    @contextmanager
    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
        mine = {id(p) for p in getattr(policy, tower).parameters()}
        right = policy.ops.linear

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return right(x, int8(weight, 1) if id(weight) in mine else weight, bias)

        with replaced(policy.ops, linear=linear):
            yield inputs

    return apply


def one_head_out(index: int) -> Attention:
    """What one head found is not used."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        out = eager_attention(q, k, v, visibility, scale).clone()
        out[:, :, index] = 0.0
        return out

    return attention


def coarse_eps(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The eps of RMSNorm is 1e-3."""
    return rms_norm(x, weight, 1e-3)


def coarse_adaptive_eps(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """The eps of the adaptive RMSNorm is 1e-3."""
    return adaptive_rms_norm(x, scale, shift, 1e-3)


def layer_norm_without_bias(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The bias of LayerNorm is left out."""
    return F.layer_norm(x, x.shape[-1:], weight, None, eps)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def frame_reuse(little: float) -> Apply:
    """Image tokens of the last call are used again where frames changed by less than `little`."""
    kept: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
        right = policy.encode_images

        def encode(images: Tensor) -> Tensor:
            if kept and float((images - kept[0][0]).abs().mean()) < little:
                return kept[0][1]
            kept[:] = [(images.clone(), right(images))]
            return kept[0][1]

        with replaced(policy, encode_images=encode):
            yield inputs

    return apply


@contextmanager
def step_skipping(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
    """After a step in which the velocity changed little, it is used once more."""
    right, skip = policy.denoise_step, [False]
    last: list[Tensor] = []

    def step(*args: Any) -> Tensor:
        if skip[0]:
            skip[0] = False
            return last[0]
        velocity = right(*args)
        if last:
            skip[0] = float((velocity - last[0]).norm() / velocity.norm()) < LITTLE_VELOCITY
        last[:] = [velocity]
        return velocity

    with replaced(policy, denoise_step=step):
        yield inputs


def blank_as_masked(level: float) -> Callable[[Inputs], Inputs]:
    """A camera whose frame has this level everywhere counts as masked."""

    def change(inputs: Inputs) -> Inputs:
        blank = (inputs.images - level).abs().amax((2, 3, 4)) == 0.0
        return inputs._replace(image_mask=inputs.image_mask & ~blank)

    return change


def first_call(*names: str) -> Callable[[Inputs], Inputs]:
    """Some inputs are those of the first call: a captured graph into which they are not copied."""
    kept: list[Inputs] = []

    def change(inputs: Inputs) -> Inputs:
        if not kept:
            kept.append(Inputs(*(tensor.clone() for tensor in inputs)))
        return inputs._replace(**{name: getattr(kept[0], name) for name in names})

    return change


def row_0(*names: str) -> Callable[[Inputs], Inputs]:
    """Some inputs of the first row serve all rows."""

    def change(inputs: Inputs) -> Inputs:
        return inputs._replace(
            **{name: getattr(inputs, name)[:1].expand_as(getattr(inputs, name)) for name in names}
        )

    return change


def causal_prompt(slots: int) -> Attention:
    """Tokens of the prompt, the last `slots`, see only those before them among themselves."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        keys = k.shape[1]
        mask = torch.ones(keys, keys, dtype=torch.bool, device=q.device)
        mask[-slots:, -slots:] = mask[-slots:, -slots:].tril()
        if visibility.mask is not None:
            mask = visibility.mask & mask[None, None]
        else:
            mask = mask[None, None]
        return eager_attention(q, k, v, Visibility(mask, None), scale)

    return attention


@contextmanager
def unscaled_prompt(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
    """Embeddings are not multiplied by sqrt(W)."""
    right, factor = policy.embed_prompt, policy.config.language.width**0.5
    with replaced(policy, embed_prompt=lambda tokens: right(tokens) / factor):
        yield inputs


def other_frequencies(change: Callable[[Tensor], Tensor]) -> Apply:
    """The rotary frequencies are others."""

    @contextmanager
    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
        right = policy.frequencies
        policy.frequencies = change(right)
        try:
            yield inputs
        finally:
            policy.frequencies = right

    return apply


@contextmanager
def integrated_in_bfloat16(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
    """What is integrated over the steps is rounded to 16 bits after each."""
    right = policy.denoise_step

    def step(x_t: Tensor, *rest: Any) -> Tensor:
        return right(x_t.bfloat16().float(), *rest).bfloat16().float()

    with replaced(policy, denoise_step=step):
        yield inputs


@contextmanager
def last_velocity_again(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> Iterator[Inputs]:
    """The last step takes the velocity of the one before."""
    right, count = policy.denoise_step, [0]
    last: list[Tensor] = []

    def step(*args: Any) -> Tensor:
        count[0] += 1
        if count[0] == policy.steps and last:
            return last[0]
        last[:] = [right(*args)]
        return last[0]

    with replaced(policy, denoise_step=step):
        yield inputs


def dimension_off(factor: float) -> Callable[[Tensor], Tensor]:
    """One action dimension is too large by a factor."""

    def change(actions: Tensor) -> Tensor:
        actions = actions.clone()
        actions[..., 0] *= factor
        return actions

    return change


def last_action_repeated(actions: Tensor) -> Tensor:
    """The last action of the chunk is the one before it."""
    return torch.cat((actions[:, :-1], actions[:, -2:-1]), dim=1)


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


def catalogue(policy: Pi0Policy, workload: Workload) -> list[Mutation]:
    """All mutations of a policy without declared layout, each with a memory of its own.

    Those that need several rows, cameras or steps are left out where there is one. Layers are
    skipped at the first, middle and last place that can matter.
    """
    found = [
        *_of_masks(policy, workload),
        *_of_attention(),
        *_of_inputs(workload),
        *_of_time(workload.steps),
        *_of_layers(policy),
        *_of_rounding(),
        *_of_data(workload.steps),
        *(_of_pi05(workload.steps) if policy.config.family == "pi05" else _of_pi0()),
        *_of_actions(),
    ]
    return [mutation for mutation in found if mutation.batch <= workload.batch_size]


def _of_masks(policy: Pi0Policy, workload: Workload) -> list[Mutation]:
    prompt = len(workload.active_cameras) * policy.config.vision.tokens
    last, slots = prompt - policy.config.vision.tokens, prompt + workload.prompt_slots
    return [
        Mutation("mask dropped", _attention(unmasked, "prefill", "denoise")),
        Mutation("mask dropped in prefill", _attention(unmasked, "prefill")),
        Mutation("mask dropped in denoise", _attention(unmasked, "denoise")),
        Mutation("mask of -10", _attention(weakly_masked(-10.0), "prefill", "denoise")),
        Mutation("is_causal misuse", _attention(causal, "denoise")),
        Mutation("is_causal in prefill", _attention(causal, "prefill")),
        Mutation("prompt causal", _attention(causal_prompt(workload.prompt_slots), "prefill")),
        Mutation("masked camera attended", on_inputs(all_cameras)),
        Mutation("last camera attended in denoise", on_cache(visible(last, prompt))),
        Mutation("padding attended", on_inputs(all_tokens)),
        Mutation("padding attended in denoise", on_cache(visible(prompt, slots))),
        Mutation("image mask of the first call", on_inputs(first_call("image_mask"))),
        Mutation("token mask of the first call", on_inputs(first_call("token_mask"))),
        Mutation("masks of row 0", on_inputs(row_0("image_mask", "token_mask")), 2),
        Mutation("image mask of row 0", on_inputs(row_0("image_mask")), 2),
        Mutation("token mask of row 0", on_inputs(row_0("token_mask")), 2),
    ]


def _of_attention() -> list[Mutation]:
    everywhere = ("vision", "prefill", "denoise")
    found = [
        Mutation("scale +5%", _attention(scaled(1.05), *everywhere)),
        Mutation("scale -5%", _attention(scaled(0.95), *everywhere)),
    ]
    for stage in everywhere:
        found += [
            Mutation(f"scale +5% in {stage}", _attention(scaled(1.05), stage)),
            Mutation(f"keys padded to 64 in {stage}", _attention(padded_keys(64), stage)),
            Mutation(f"first key dropped in {stage}", _attention(dropped_key(0), stage)),
            Mutation(f"one head left out in {stage}", _attention(one_head_out(1), stage)),
        ]
    return [
        *found,
        Mutation("keys padded to 8 in denoise", _attention(padded_keys(8), "denoise")),
        Mutation("last key dropped in vision", _attention(dropped_key(-1), "vision")),
        Mutation("last key dropped in denoise", _attention(dropped_key(-1), "denoise")),
        Mutation("strongest 64 keys only", _attention(with_weights(strongest(64)), "prefill")),
        Mutation(
            "softmax without the maximum",
            _attention(with_weights(unshifted_softmax), *everywhere),
        ),
        Mutation(
            "logits clamped at 50",
            _attention(with_logits(lambda logits: logits.clamp(max=50.0)), *everywhere),
        ),
        Mutation(
            "logits soft-capped at 50",
            _attention(with_logits(lambda logits: 50.0 * (logits / 50.0).tanh()), *everywhere),
        ),
    ]


def _of_inputs(workload: Workload) -> list[Mutation]:
    found = [
        Mutation(
            "suffix positions +1",
            on_cache(lambda cache: cache._replace(valid_count=cache.valid_count + 1)),
        ),
        Mutation(
            "prompt rolled by one",
            on_inputs(lambda inputs: inputs._replace(tokens=inputs.tokens.roll(1, dims=1))),
        ),
        Mutation("prompt not scaled", unscaled_prompt),
        Mutation(
            "images in [0, 1]",
            on_inputs(lambda inputs: inputs._replace(images=inputs.images / 2.0 + 0.5)),
        ),
        Mutation(
            "images mirrored",
            on_inputs(lambda inputs: inputs._replace(images=inputs.images.flip(-1))),
        ),
        *(
            Mutation(f"{name} of the first call", on_inputs(first_call(name)))
            for name in ("images", "tokens", "noise")
        ),
        *(
            Mutation(f"{name} of row 0", on_inputs(row_0(name)), 2)
            for name in ("images", "tokens", "noise")
        ),
    ]
    active = [index for index, on in enumerate(workload.active_cameras) if on]
    if len(active) > 1:
        found += [
            Mutation(f"camera {index} skipped", on_inputs(without_camera(index)))
            for index in active[:2]
        ]
        found.append(Mutation("cameras swapped", on_inputs(swapped_cameras(active[0], active[1]))))
    return found


def swapped_cameras(one: int, other: int) -> Callable[[Inputs], Inputs]:
    """Two cameras change places."""

    def change(inputs: Inputs) -> Inputs:
        order = list(range(inputs.images.shape[1]))
        order[one], order[other] = other, one
        return inputs._replace(images=inputs.images[:, order])

    return change


def _of_time(steps: int) -> list[Mutation]:
    found = [
        Mutation("rotary halves swapped", on_rotary(rotary_backwards)),
        Mutation("rotary interleaved", on_rotary(rotary_interleaved)),
        Mutation("rotary base of 20,000", other_frequencies(lambda f: f ** (1.0 + 0.0753))),
        Mutation("rotary frequencies of 1% more", other_frequencies(lambda f: 1.01 * f)),
        Mutation("time reversed", time_reversed),
    ]
    if steps > 1:
        found += [
            Mutation("last step left out", last_step_left_out),
            Mutation("last velocity again", last_velocity_again),
            Mutation("one step fewer, rescheduled", one_step_fewer),
        ]
    return found if steps > 1 else found[:-1]


def _of_layers(policy: Pi0Policy) -> list[Mutation]:
    config = policy.config
    depth, last = config.language.depth, config.language.depth - 1
    places = {
        "vision": (0, config.vision.depth // 2, config.vision.depth - 1),
        # Of the last language layer the keys and values alone are read.
        "language": (0, depth // 2 - 1, last - 1),
        "expert": (0, depth // 2, last),
    }
    return [
        Mutation("norm weight as w", on_ops(rms_norm=rms_norm_without_one)),
        Mutation(
            "eps of 1e-3",
            on_ops(rms_norm=coarse_eps, adaptive_rms_norm=coarse_adaptive_eps),
        ),
        Mutation("LayerNorm without bias", on_ops(layer_norm=layer_norm_without_bias)),
        Mutation("erf GELU", on_ops(gelu=F.gelu, gelu_mul=lambda gate, up: F.gelu(gate) * up)),
        Mutation(
            "quick GELU",
            on_ops(gelu=quick_gelu, gelu_mul=lambda gate, up: quick_gelu(gate) * up),
        ),
        *(
            Mutation(f"{tower} layer {index} skipped", skipped_layer(tower, index))
            for tower, indices in places.items()
            for index in sorted(set(indices))
        ),
        *(
            Mutation(f"K/V of layer {index} stale", stale_layer(index))
            for index in sorted({0, depth // 2, last})
        ),
    ]


def _of_rounding() -> list[Mutation]:
    """Coarser numbers than the precision says, in a configuration that is not marked lossy."""
    return [
        *(
            Mutation(f"int8 weights in {tower}", int8_weights(tower))
            for tower in ("vision", "language", "expert")
        ),
        Mutation("int8 keys and values", _attention(int8_keys_values, "prefill", "denoise")),
        Mutation("integrated in bfloat16", integrated_in_bfloat16),
    ]


def _of_data(steps: int) -> list[Mutation]:
    """Shortcuts that are taken for some data only."""
    found = [
        Mutation("vision reused for a similar frame", frame_reuse(LITTLE_FRAME)),
        Mutation("vision reused for a nearly equal frame", frame_reuse(LITTLE_FRAME / 5.0)),
        Mutation("black camera as masked", on_inputs(blank_as_masked(-1.0))),
        Mutation("white camera as masked", on_inputs(blank_as_masked(1.0))),
        Mutation("grey camera as masked", on_inputs(blank_as_masked(0.0))),
    ]
    if steps > 3:
        found.append(Mutation("step skipped where little changed", step_skipping))
    return found


def _of_actions() -> list[Mutation]:
    return [
        Mutation("one action dimension +5%", on_actions(dimension_off(1.05))),
        Mutation("last action repeated", on_actions(last_action_repeated)),
        Mutation("rows in another order", on_actions(lambda actions: actions.roll(1, dims=0)), 2),
        Mutation("NaN", on_actions(lambda actions: actions * torch.nan)),
        Mutation("zeros", on_actions(torch.zeros_like)),
        Mutation("first call's output again", on_actions(replayed(0))),
        Mutation("last call's output again", on_actions(replayed(-2))),
    ]


def _of_pi0() -> list[Mutation]:
    return [
        Mutation("state token left out", _attention(without_state_key, "denoise")),
        Mutation("state sees the actions", _attention(state_sees_actions, "denoise")),
        Mutation("state of the first call", on_inputs(first_call("state"))),
        Mutation("state of row 0", on_inputs(row_0("state")), 2),
        Mutation(
            "state ignored",
            on_inputs(lambda inputs: inputs._replace(state=torch.zeros_like(inputs.state))),
        ),
    ]


def _of_pi05(steps: int) -> list[Mutation]:
    found = [
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
        Mutation("state in the prompt left out", on_inputs(without_state_in_prompt)),
        Mutation("state in the prompt stale", stale_state_in_prompt),
    ]
    if steps > 1:
        found.append(Mutation("condition stale by one step", condition_stale))
    return found
