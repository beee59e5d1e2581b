"""Wrong policies: each mutation is one mistake that an optimisation could make.

    call = mutation.candidate(policy, previous)
    guard.check(call, inputs, reference, ...)

`previous` are other inputs of the same workload, for mistakes that remember an earlier call.
A mutation says which inputs the policy gets and which attributes (stages, operations, layers) are
others for the time of a call. What a mistake remembers of earlier calls begins anew with each
catalogue.

No mutation is what rounding in float32 hides, for instance a softmax whose sums have another order.

Letters: B batch, S queries, T keys, Hq query heads, Hkv key/value heads, D head dim, W width,
C cameras, L prompt slots, H horizon, A action dim.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.ops import (
    NOT_ALLOWED,
    Attention,
    Visibility,
    adaptive_rms_norm,
    eager_attention,
    rms_norm,
)
from openpi_opt.pi0.policy import Pi0Policy, PrefixCache
from openpi_opt.pi0.schedule import step_size, time_features
from openpi_opt.pi0.workload import Workload

STATE_TOKENS = 6  # of a prompt of pi05 here; a robot's state is some 20 to 60
# Thresholds that shortcuts of the field use, or could.
LITTLE_FRAME, LITTLE_VELOCITY = 0.02, 0.05
INT8_LEVELS = 127.0

# Objects with the attributes that are others for a call.
Changes = list[tuple[object, dict[str, Any]]]
Apply = Callable[[Pi0Policy, Inputs, Inputs], tuple[Inputs, Changes]]


@dataclass(frozen=True)
class Mutation:
    """One mistake. `batch` is the least batch size in which it is one."""

    name: str
    apply: Apply
    batch: int = 1

    def candidate(self, policy: Pi0Policy, previous: Inputs) -> Callable[[Inputs], Tensor]:
        """The mistaken policy, as the guard calls a candidate: inputs -> actions [B, H, A]."""

        def call(inputs: Inputs) -> Tensor:
            given, changes = self.apply(policy, inputs, previous)
            with ExitStack() as stack:
                for owner, values in changes:
                    stack.enter_context(replaced(owner, **values))
                return policy.sample_actions(given)

        return call


@contextmanager
def replaced(owner: object, **values: Any) -> Iterator[None]:
    """Set attributes for the time of the context; those that were not there are deleted again."""
    own = {**vars(owner), **(owner._buffers if isinstance(owner, nn.Module) else {})}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in own:
                setattr(owner, name, own[name])
            else:
                delattr(owner, name)


def on_ops(**values: Any) -> Apply:
    """Replace operations of the policy."""
    return lambda policy, inputs, previous: (inputs, [(policy.ops, values)])


def on_policy(values: Callable[[Pi0Policy], dict[str, Any]]) -> Apply:
    """Replace stages or constants of the policy."""
    return lambda policy, inputs, previous: (inputs, [(policy, values(policy))])


def on_inputs(change: Callable[[Inputs], Inputs]) -> Apply:
    """Give the policy other inputs."""
    return lambda policy, inputs, previous: (change(inputs), [])


def after(stage: str, change: Callable[[Any], Any]) -> Apply:
    """Change what a stage returns."""

    def values(policy: Pi0Policy) -> dict[str, Any]:
        right = getattr(policy, stage)
        return {stage: lambda *given: change(right(*given))}

    return on_policy(values)


def on_attention(function: Attention, *stages: str) -> Apply:
    """Replace attention in some stages."""
    return on_ops(**{f"attention_{stage}": function for stage in stages})


def on_rotary(rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Apply:
    """Replace the rotary embedding, of one tensor and of queries and keys together."""
    return on_ops(
        rotary=rotate, rotary_qk=lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))
    )


def replayed(which: int) -> Callable[[Tensor], Tensor]:
    """Actions of an earlier call: 0 the first one's, -2 the last one's. The first call is right."""
    kept: list[Tensor] = []

    def change(actions: Tensor) -> Tensor:
        kept.append(actions)
        return kept[max(which, -len(kept))]

    return change


def skipped_layer(tower: str, index: int) -> Apply:
    """The layer hands its input on (its keys and values are still computed)."""

    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> tuple[Inputs, Changes]:
        if tower == "vision":
            return inputs, [(policy.vision.encoder.layers[index], {"forward": lambda x: x})]
        layer = getattr(policy, tower).layers[index]
        forward = layer.forward
        return inputs, [(layer, {"forward": lambda x, *rest: (x, forward(x, *rest)[1])})]

    return apply


def stale_layer(index: int) -> Apply:
    """Keys and values of one layer are those of an earlier call."""

    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> tuple[Inputs, Changes]:
        prefill = policy.prefill
        old = policy.prefill_of(previous, policy.encode_images(previous.images))

        def mixed(*given: Tensor) -> PrefixCache:
            cache = prefill(*given)
            layers = list(cache.layers)
            layers[index] = old.layers[index]
            return cache._replace(layers=layers)

        return inputs, [(policy, {"prefill": mixed})]

    return apply


def one_step_fewer(policy: Pi0Policy) -> dict[str, Any]:
    """A schedule of one step less that still reaches time 0."""
    steps = policy.steps - 1
    table = time_features(steps, policy.config.expert.width).to(policy.device)
    return {"time_table": table, "steps": steps, "dt": step_size(steps)}


def masking(change: Callable[[Tensor], Tensor]) -> Attention:
    """Attention with another mask; `change` gets a copy of the right one, [B, 1, S, T]."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
        if visibility.mask is not None:
            mask = visibility.mask
        mask = change(mask.expand(len(q), 1, q.shape[1], k.shape[1]).clone())
        return eager_attention(q, k, v, Visibility(mask, None), scale)

    return attention


def causal(mask: Tensor) -> Tensor:
    """What `is_causal=True` means for fewer queries than keys: query i sees keys 0..i."""
    return torch.ones_like(mask).tril()


def causal_prompt(slots: int) -> Callable[[Tensor], Tensor]:
    """Tokens of the prompt, the last `slots`, see only those before them among themselves."""

    def change(mask: Tensor) -> Tensor:
        mask[..., -slots:, -slots:] = mask[..., -slots:, -slots:].tril()
        return mask

    return change


def without_state_key(mask: Tensor) -> Tensor:
    """Actions do not see the state token, which is the first of the suffix."""
    queries, keys = mask.shape[2:]
    mask[:, :, 1:, keys - queries] = False
    return mask


def state_sees_actions(mask: Tensor) -> Tensor:
    """The state token, the first of the suffix, sees the actions as they see it."""
    mask[:, :, :1] = mask[:, :, 1:2]
    return mask


def dropped_key(index: int) -> Attention:
    """One key is seen by no query: off by one at an end."""

    def change(mask: Tensor) -> Tensor:
        mask[..., index] = False
        return mask

    return masking(change)


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
    return after("modulations", lambda parts: torch.cat(change(*parts.chunk(3, -1)), -1))


def state_in_prompt(inputs: Inputs) -> Tensor:
    """[B, L]: the last STATE_TOKENS valid tokens, taken for those that pi05's state becomes."""
    left = inputs.token_mask.flip(1).cumsum(1).flip(1)
    return inputs.token_mask & (left <= STATE_TOKENS)


def without_state_in_prompt(inputs: Inputs) -> Inputs:
    """The tokens that say the state count as padding."""
    return inputs._replace(token_mask=inputs.token_mask & ~state_in_prompt(inputs))


def stale_state_in_prompt(
    policy: Pi0Policy, inputs: Inputs, previous: Inputs
) -> tuple[Inputs, Changes]:
    """The state is that of the call before."""
    tokens = torch.where(state_in_prompt(inputs), previous.tokens, inputs.tokens)
    return inputs._replace(tokens=tokens), []


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


def weighing(weights: Callable[[Tensor, Tensor], Tensor]) -> Attention:
    """Attention whose weights are a function of float32 logits [B, Hq, S, T] and the mask."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        keys, values = (t.transpose(1, 2).expand(-1, q.shape[2], -1, -1) for t in (k, v))
        logits = (q.transpose(1, 2) @ keys.transpose(2, 3) * scale).float()
        mask = visibility.mask
        if mask is None:
            mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
        return (weights(logits, mask).to(q.dtype) @ values).transpose(1, 2)

    return attention


def with_logits(change: Callable[[Tensor], Tensor]) -> Attention:
    """The logits are changed before the softmax."""
    return weighing(lambda logits, mask: _masked(change(logits), mask).softmax(-1))


def with_weights(change: Callable[[Tensor], Tensor]) -> Attention:
    """The softmax is replaced: `change` gets masked float32 logits and returns the weights."""
    return weighing(lambda logits, mask: change(_masked(logits, mask)))


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, NOT_ALLOWED)


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

    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> tuple[Inputs, Changes]:
        mine = {id(p) for p in getattr(policy, tower).parameters()}
        right = policy.ops.linear

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return right(x, int8(weight, 1) if id(weight) in mine else weight, bias)

        return inputs, [(policy.ops, {"linear": linear})]

    return apply


def one_head_out(index: int) -> Attention:
    """What one head found is not used."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        out = eager_attention(q, k, v, visibility, scale).clone()
        out[:, :, index] = 0.0
        return out

    return attention


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def frame_reuse(little: float) -> Apply:
    """Image tokens of the last call are used again where frames changed by less than `little`."""
    kept: list[tuple[Tensor, Tensor]] = []

    def values(policy: Pi0Policy) -> dict[str, Any]:
        right = policy.encode_images

        def encode(images: Tensor) -> Tensor:
            if not kept or float((images - kept[0][0]).abs().mean()) >= little:
                kept[:] = [(images.clone(), right(images))]
            return kept[0][1]

        return {"encode_images": encode}

    return on_policy(values)


def step_skipping(policy: Pi0Policy) -> dict[str, Any]:
    """After a step in which the velocity changed little, it is used once more."""
    right = policy.denoise_step
    last: list[Tensor] = []

    def step(x_t: Tensor, *rest: Any) -> Tensor:
        if len(last) == 2 and float((last[1] - last[0]).norm() / last[1].norm()) < LITTLE_VELOCITY:
            velocity = last[1]
            last.clear()
            return x_t + velocity
        x_next = right(x_t, *rest)
        last[:] = [*last[-1:], x_next - x_t]
        return x_next

    return {"denoise_step": step}


def last_velocity_again(policy: Pi0Policy) -> dict[str, Any]:
    """The last step takes the velocity of the one before."""
    right, moved = policy.denoise_step, list[Tensor]()

    def step(x_t: Tensor, *rest: Any) -> Tensor:
        if len(moved) < policy.steps - 1:
            moved.append(right(x_t, *rest) - x_t)
        return x_t + moved[-1]

    return {"denoise_step": step}


def integrated_in_bfloat16(policy: Pi0Policy) -> dict[str, Any]:
    """What is integrated over the steps is rounded to 16 bits after each."""
    right = policy.denoise_step
    return {"denoise_step": lambda x, *rest: right(x.bfloat16().float(), *rest).bfloat16().float()}


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


def without_camera(index: int) -> Callable[[Inputs], Inputs]:
    """An active camera counts as masked."""

    def change(inputs: Inputs) -> Inputs:
        mask = inputs.image_mask.clone()
        mask[:, index] = False
        return inputs._replace(image_mask=mask)

    return change


def swapped_cameras(one: int, other: int) -> Callable[[Inputs], Inputs]:
    """Two cameras change places."""

    def change(inputs: Inputs) -> Inputs:
        order = list(range(inputs.images.shape[1]))
        order[one], order[other] = other, one
        return inputs._replace(images=inputs.images[:, order])

    return change


def visible(start: int, stop: int) -> Apply:
    """Prefix keys [start, stop) become visible to the suffix; positions stay."""

    def change(cache: PrefixCache) -> PrefixCache:
        assert cache.mask is not None
        mask = cache.mask.clone()
        mask[:, start:stop] = True
        return cache._replace(mask=mask)

    return after("prefill", change)


def everywhere(name: str) -> Callable[[Inputs], Inputs]:
    """A mask is all True: what is masked counts as valid."""
    return lambda inputs: inputs._replace(**{name: torch.ones_like(getattr(inputs, name))})


def catalogue(policy: Pi0Policy, workload: Workload) -> list[Mutation]:
    """All mutations of a policy without declared layout, each with a memory of its own.

    Those that need several rows, cameras or steps are left out where there is one. Layers are
    skipped at the first, middle and last place that can matter.
    """
    found = [
        *_of_masks(policy, workload),
        *_ofon_attention(),
        *_of_inputs(policy.config.language.width, workload),
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

    def weak(logits: Tensor, mask: Tensor) -> Tensor:
        return (logits - 10.0 * ~mask).softmax(-1)

    return [
        Mutation("mask dropped", on_attention(masking(torch.ones_like), "prefill", "denoise")),
        Mutation("mask dropped in prefill", on_attention(masking(torch.ones_like), "prefill")),
        Mutation("mask dropped in denoise", on_attention(masking(torch.ones_like), "denoise")),
        Mutation("mask of -10", on_attention(weighing(weak), "prefill", "denoise")),
        Mutation("is_causal misuse", on_attention(masking(causal), "denoise")),
        Mutation("is_causal in prefill", on_attention(masking(causal), "prefill")),
        Mutation(
            "prompt causal", on_attention(masking(causal_prompt(workload.prompt_slots)), "prefill")
        ),
        Mutation("masked camera attended", on_inputs(everywhere("image_mask"))),
        Mutation("last camera attended in denoise", visible(last, prompt)),
        Mutation("padding attended", on_inputs(everywhere("token_mask"))),
        Mutation("padding attended in denoise", visible(prompt, slots)),
        Mutation("image mask of the first call", on_inputs(first_call("image_mask"))),
        Mutation("token mask of the first call", on_inputs(first_call("token_mask"))),
        Mutation("masks of row 0", on_inputs(row_0("image_mask", "token_mask")), 2),
        Mutation("image mask of row 0", on_inputs(row_0("image_mask")), 2),
        Mutation("token mask of row 0", on_inputs(row_0("token_mask")), 2),
    ]


def _ofon_attention() -> list[Mutation]:
    everywhere = ("vision", "prefill", "denoise")
    found = [
        Mutation("scale +5%", on_attention(scaled(1.05), *everywhere)),
        Mutation("scale -5%", on_attention(scaled(0.95), *everywhere)),
    ]
    for stage in everywhere:
        found += [
            Mutation(f"scale +5% in {stage}", on_attention(scaled(1.05), stage)),
            Mutation(f"keys padded to 64 in {stage}", on_attention(padded_keys(64), stage)),
            Mutation(f"first key dropped in {stage}", on_attention(dropped_key(0), stage)),
            Mutation(f"one head left out in {stage}", on_attention(one_head_out(1), stage)),
        ]
    return [
        *found,
        Mutation("keys padded to 8 in denoise", on_attention(padded_keys(8), "denoise")),
        Mutation("last key dropped in vision", on_attention(dropped_key(-1), "vision")),
        Mutation("last key dropped in denoise", on_attention(dropped_key(-1), "denoise")),
        Mutation("strongest 64 keys only", on_attention(with_weights(strongest(64)), "prefill")),
        Mutation(
            "softmax without the maximum",
            on_attention(with_weights(unshifted_softmax), *everywhere),
        ),
        Mutation(
            "logits clamped at 50",
            on_attention(with_logits(lambda logits: logits.clamp(max=50.0)), *everywhere),
        ),
        Mutation(
            "logits soft-capped at 50",
            on_attention(with_logits(lambda logits: 50.0 * (logits / 50.0).tanh()), *everywhere),
        ),
    ]


def _of_inputs(width: int, workload: Workload) -> list[Mutation]:
    found = [
        Mutation(
            "suffix positions +1",
            after("prefill", lambda c: c._replace(valid_count=c.valid_count + 1)),
        ),
        Mutation(
            "prompt rolled by one",
            on_inputs(lambda inputs: inputs._replace(tokens=inputs.tokens.roll(1, dims=1))),
        ),
        Mutation("prompt not scaled", after("embed_prompt", lambda x: x / width**0.5)),
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


def _of_time(steps: int) -> list[Mutation]:
    found = [
        Mutation("rotary halves swapped", on_rotary(rotary_backwards)),
        Mutation("rotary interleaved", on_rotary(rotary_interleaved)),
        Mutation(
            "rotary base of 20,000", on_policy(lambda p: {"frequencies": p.frequencies**1.0753})
        ),
        Mutation(
            "rotary frequencies of 1% more",
            on_policy(lambda p: {"frequencies": 1.01 * p.frequencies}),
        ),
        Mutation("time reversed", on_policy(lambda p: {"time_table": p.time_table.flip(0)})),
    ]
    if steps > 1:
        found += [
            Mutation("last step left out", on_policy(lambda p: {"time_table": p.time_table[:-1]})),
            Mutation("last velocity again", on_policy(last_velocity_again)),
            Mutation("one step fewer, rescheduled", on_policy(one_step_fewer)),
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
            on_ops(
                rms_norm=lambda x, weight, eps: rms_norm(x, weight, 1e-3),
                adaptive_rms_norm=lambda x, a, b, eps: adaptive_rms_norm(x, a, b, 1e-3),
            ),
        ),
        Mutation(
            "LayerNorm without bias",
            on_ops(layer_norm=lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, None, eps)),
        ),
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
        Mutation("int8 keys and values", on_attention(int8_keys_values, "prefill", "denoise")),
        Mutation("integrated in bfloat16", on_policy(integrated_in_bfloat16)),
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
        found.append(Mutation("step skipped where little changed", on_policy(step_skipping)))
    return found


def _of_actions() -> list[Mutation]:
    return [
        Mutation("one action dimension +5%", after("sample_actions", dimension_off(1.05))),
        Mutation("last action repeated", after("sample_actions", last_action_repeated)),
        Mutation(
            "rows in another order",
            after("sample_actions", lambda actions: actions.roll(1, dims=0)),
            2,
        ),
        Mutation("NaN", after("sample_actions", lambda actions: actions * torch.nan)),
        Mutation("zeros", after("sample_actions", torch.zeros_like)),
        Mutation("first call's output again", after("sample_actions", replayed(0))),
        Mutation("last call's output again", after("sample_actions", replayed(-2))),
    ]


def _of_pi0() -> list[Mutation]:
    return [
        Mutation("state token left out", on_attention(masking(without_state_key), "denoise")),
        Mutation("state sees the actions", on_attention(masking(state_sees_actions), "denoise")),
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
        found.append(
            Mutation(
                "condition stale by one step",
                on_policy(
                    lambda p: {"time_table": torch.cat((p.time_table[:1], p.time_table[:-1]))}
                ),
            )
        )
    return found
