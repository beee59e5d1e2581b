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
STAGES = ("vision", "prefill", "denoise")

# Objects with the attributes that are others for a call.
Changes = list[tuple[object, dict[str, Any]]]
Apply = Callable[[Pi0Policy, Inputs, Inputs], tuple[Inputs, Changes]]
OnTensor = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Mutation:
    """One mistake."""

    name: str
    apply: Apply

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


# --- Where a mistake is made --------------------------------------------------------------------


def on_ops(**values: Any) -> Apply:
    """Replace operations of the policy."""
    return lambda policy, inputs, previous: (inputs, [(policy.ops, values)])


def on_policy(values: Callable[[Pi0Policy], dict[str, Any]]) -> Apply:
    """Replace stages or constants of the policy."""
    return lambda policy, inputs, previous: (inputs, [(policy, values(policy))])


def on_inputs(change: Callable[[Inputs], Inputs]) -> Apply:
    """Give the policy other inputs."""
    return lambda policy, inputs, previous: (change(inputs), [])


def on_input(name: str, change: OnTensor) -> Apply:
    """Give the policy one other input."""
    return on_inputs(lambda inputs: inputs._replace(**{name: change(getattr(inputs, name))}))


def on_stage(stage: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Apply:
    """Replace a stage by what `make` makes of it."""
    return on_policy(lambda policy: {stage: make(getattr(policy, stage))})


def after(stage: str, change: Callable[[Any], Any]) -> Apply:
    """Change what a stage returns."""
    return on_stage(stage, lambda right: lambda *given: change(right(*given)))


def on_attention(function: Attention, *stages: str) -> Apply:
    """Replace attention in some stages, by default in all."""
    return on_ops(**{f"attention_{stage}": function for stage in stages or STAGES})


def on_mask(change: OnTensor, *stages: str) -> Apply:
    """Attention with another mask; `change` gets a copy of the right one, [B, 1, S, T]."""

    def masked(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Any:
        mask = _mask(q, visibility).expand(len(q), 1, q.shape[1], k.shape[1]).clone()
        return q, k, v, Visibility(change(mask), None), scale

    return on_attention(with_operands(masked), *stages)


def on_rotary(rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Apply:
    """Replace the rotary embedding, of one tensor and of queries and keys together."""
    return on_ops(
        rotary=rotate, rotary_qk=lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))
    )


def on_gelu(gelu: OnTensor) -> Apply:
    """Replace the activation, alone and times the gate's other half."""
    return on_ops(gelu=gelu, gelu_mul=lambda gate, up: gelu(gate) * up)


def on_modulations(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Apply:
    """Scale, shift and gate of all norms, [M, W] each, are changed before they are used."""
    return after("modulations", lambda parts: torch.cat(change(*parts.chunk(3, -1)), -1))


# --- Attention ----------------------------------------------------------------------------------


def _mask(q: Tensor, visibility: Visibility) -> Tensor:
    right = visibility.mask
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device) if right is None else right


def weighing(weights: Callable[[Tensor, Tensor], Tensor]) -> Attention:
    """Attention whose weights are a function of float32 logits [B, Hq, S, T] and the mask."""

    def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Tensor:
        keys, values = (t.transpose(1, 2).expand(-1, q.shape[2], -1, -1) for t in (k, v))
        logits = (q.transpose(1, 2) @ keys.transpose(2, 3) * scale).float()
        shares = weights(logits, _mask(q, visibility))
        return (shares.to(q.dtype) @ values).transpose(1, 2)

    return attention


def with_logits(change: OnTensor) -> Attention:
    """The logits are changed before the softmax."""
    return weighing(lambda logits, mask: change(logits).masked_fill(~mask, NOT_ALLOWED).softmax(-1))


def with_weights(change: OnTensor) -> Attention:
    """The softmax is replaced: `change` gets masked float32 logits and returns the weights."""
    return weighing(lambda logits, mask: change(logits.masked_fill(~mask, NOT_ALLOWED)))


def causal_prompt(slots: int) -> OnTensor:
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


def without_key(index: int) -> OnTensor:
    """One key is seen by no query: off by one at an end."""
    return lambda mask: mask.index_fill(-1, torch.tensor(index % mask.shape[-1]).to(mask.device), 0)


def with_operands(change: Callable[..., tuple[Any, ...]]) -> Attention:
    """Attention of other queries, keys, values, visibility and scale."""
    return lambda *given: eager_attention(*change(*given))


def scaled(factor: float) -> Attention:
    """Logits scaled by `factor` too much."""
    return with_operands(lambda q, k, v, visibility, scale: (q, k, v, visibility, factor * scale))


def padded_keys(multiple: int) -> Attention:
    """Keys and values are padded with zeros to a multiple, and nothing masks them."""

    def padded(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> Any:
        more = -k.shape[1] % multiple or multiple
        k, v = (F.pad(tensor, (0, 0, 0, 0, 0, more)) for tensor in (k, v))
        mask = visibility.mask
        mask = None if mask is None else F.pad(mask, (0, more), value=True)
        return q, k, v, Visibility(mask, None), scale

    return with_operands(padded)


def one_head_out(*given: Any) -> Tensor:
    """What one head found is not used."""
    out = eager_attention(*given).clone()
    out[:, :, 1] = 0.0
    return out


def unshifted_softmax(logits: Tensor) -> Tensor:
    """The maximum is not subtracted."""
    shares = logits.exp()
    return shares / shares.sum(-1, keepdim=True)


def strongest(count: int) -> OnTensor:
    """Only the largest logits count: sparse attention."""

    def weights(logits: Tensor) -> Tensor:
        least = logits.topk(min(count, logits.shape[-1]), dim=-1).values[..., -1:]
        return logits.masked_fill(logits < least, NOT_ALLOWED).softmax(-1)

    return weights


# --- Numbers ------------------------------------------------------------------------------------


def int8(x: Tensor, dim: int) -> Tensor:
    """`x` rounded to 8 bits, one scale for each vector along `dim`."""
    scale = x.abs().amax(dim, keepdim=True).clamp_min(1e-12) / INT8_LEVELS
    return (x / scale).round().mul(scale).to(x.dtype)


def int8_weights(tower: str) -> Apply:
    """All weights of a tower are kept in 8 bits, one scale for each output."""

    def apply(policy: Pi0Policy, inputs: Inputs, previous: Inputs) -> tuple[Inputs, Changes]:
        mine = {id(p) for p in getattr(policy, tower).parameters()}
        right = policy.ops.linear

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return right(x, int8(weight, 1) if id(weight) in mine else weight, bias)

        return inputs, [(policy.ops, {"linear": linear})]

    return apply


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


# --- What is left out or remembered -------------------------------------------------------------


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


def replayed(which: int) -> OnTensor:
    """Actions of an earlier call: 0 the first one's, -2 the last one's. The first call is right."""
    kept: list[Tensor] = []

    def change(actions: Tensor) -> Tensor:
        kept.append(actions)
        return kept[max(which, -len(kept))]

    return change


def first_call(name: str) -> Apply:
    """An input is that of the first call: a captured graph into which it is not copied."""
    kept: list[Tensor] = []

    def change(tensor: Tensor) -> Tensor:
        if not kept:
            kept.append(tensor.clone())
        return kept[0]

    return on_input(name, change)


def row_0(*names: str) -> Apply:
    """Some inputs of the first row serve all rows."""

    def change(inputs: Inputs) -> Inputs:
        shared = {name: getattr(inputs, name)[:1] for name in names}
        return inputs._replace(**{n: t.expand_as(getattr(inputs, n)) for n, t in shared.items()})

    return on_inputs(change)


def one_step_fewer(policy: Pi0Policy) -> dict[str, Any]:
    """A schedule of one step less that still reaches time 0."""
    steps = policy.steps - 1
    table = time_features(steps, policy.config.expert.width).to(policy.device)
    return {"time_table": table, "steps": steps, "dt": step_size(steps)}


def frame_reuse(little: float) -> Apply:
    """Image tokens of the last call are used again where frames changed by less than `little`."""
    kept: list[tuple[Tensor, Tensor]] = []

    def make(right: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def encode(images: Tensor) -> Tensor:
            if not kept or float((images - kept[0][0]).abs().mean()) >= little:
                kept[:] = [(images.clone(), right(images))]
            return kept[0][1]

        return encode

    return on_stage("encode_images", make)


def step_skipping(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """After a step in which the velocity changed little, it is used once more."""
    last: list[Tensor] = []

    def step(x_t: Tensor, *rest: Any) -> Tensor:
        if len(last) == 2 and float((last[1] - last[0]).norm() / last[1].norm()) < LITTLE_VELOCITY:
            velocity = last[1]
            last.clear()
            return x_t + velocity
        x_next = right(x_t, *rest)
        last[:] = [*last[-1:], x_next - x_t]
        return x_next

    return step


def last_velocity_again(policy: Pi0Policy) -> dict[str, Any]:
    """The last step takes the velocity of the one before."""
    right, moved = policy.denoise_step, list[Tensor]()

    def step(x_t: Tensor, *rest: Any) -> Tensor:
        if len(moved) < policy.steps - 1:
            moved.append(right(x_t, *rest) - x_t)
        return x_t + moved[-1]

    return {"denoise_step": step}


def blank_as_masked(level: float) -> Apply:
    """A camera whose frame has this level everywhere counts as masked."""

    def change(inputs: Inputs) -> Inputs:
        blank = (inputs.images - level).abs().amax((2, 3, 4)) == 0.0
        return inputs._replace(image_mask=inputs.image_mask & ~blank)

    return on_inputs(change)


def swapped_cameras(one: int, other: int) -> Apply:
    """Two cameras change places."""

    def change(images: Tensor) -> Tensor:
        order = list(range(images.shape[1]))
        order[one], order[other] = other, one
        return images[:, order]

    return on_input("images", change)


def visible(start: int, stop: int) -> Apply:
    """Prefix keys [start, stop) become visible to the suffix; positions stay."""

    def change(cache: PrefixCache) -> PrefixCache:
        assert cache.mask is not None
        mask = cache.mask.clone()
        mask[:, start:stop] = True
        return cache._replace(mask=mask)

    return after("prefill", change)


def state_in_prompt(inputs: Inputs) -> Tensor:
    """[B, L]: the last STATE_TOKENS valid tokens, taken for those that pi05's state becomes."""
    left = inputs.token_mask.flip(1).cumsum(1).flip(1)
    return inputs.token_mask & (left <= STATE_TOKENS)


def stale_state_in_prompt(
    policy: Pi0Policy, inputs: Inputs, previous: Inputs
) -> tuple[Inputs, Changes]:
    """The state is that of the call before."""
    tokens = torch.where(state_in_prompt(inputs), previous.tokens, inputs.tokens)
    return inputs._replace(tokens=tokens), []


def dimension_off(actions: Tensor) -> Tensor:
    """One action dimension is 5% too large."""
    actions = actions.clone()
    actions[..., 0] *= 1.05
    return actions


# --- The table ----------------------------------------------------------------------------------


def catalogue(policy: Pi0Policy, workload: Workload) -> list[Mutation]:
    """All mutations of a policy without declared layout, each with a memory of its own.

    Those that need several rows, cameras or steps are left out where there is one. Layers are
    skipped at the first, middle and last place that can matter.
    """
    found = {
        **_of_masks(policy, workload),
        **_of_attention(),
        **_of_inputs(policy.config.language.width, workload),
        **_of_time(workload.steps),
        **_of_layers(policy),
        **_of_data(workload.steps),
        **(_of_pi05(workload.steps) if policy.config.family == "pi05" else _of_pi0()),
        **_of_actions(),
    }
    if workload.batch_size > 1:
        found |= _of_rows(policy.config.family)
    return [Mutation(name, apply) for name, apply in found.items()]


def _of_masks(policy: Pi0Policy, workload: Workload) -> dict[str, Apply]:
    prompt = len(workload.active_cameras) * policy.config.vision.tokens
    last, slots = prompt - policy.config.vision.tokens, prompt + workload.prompt_slots

    def weak(logits: Tensor, mask: Tensor) -> Tensor:
        return (logits - 10.0 * ~mask).softmax(-1)

    def causal(mask: Tensor) -> Tensor:  # `is_causal=True`: query i sees keys 0..i
        return torch.ones_like(mask).tril()

    return {
        "mask dropped": on_mask(torch.ones_like, "prefill", "denoise"),
        "mask dropped in prefill": on_mask(torch.ones_like, "prefill"),
        "mask dropped in denoise": on_mask(torch.ones_like, "denoise"),
        "mask of -10": on_attention(weighing(weak), "prefill", "denoise"),
        "is_causal misuse": on_mask(causal, "denoise"),
        "is_causal in prefill": on_mask(causal, "prefill"),
        "prompt causal": on_mask(causal_prompt(workload.prompt_slots), "prefill"),
        "masked camera attended": on_input("image_mask", torch.ones_like),
        "last camera attended in denoise": visible(last, prompt),
        "padding attended": on_input("token_mask", torch.ones_like),
        "padding attended in denoise": visible(prompt, slots),
        "image mask of the first call": first_call("image_mask"),
        "token mask of the first call": first_call("token_mask"),
    }


def _of_attention() -> dict[str, Apply]:
    found = {"scale +5%": on_attention(scaled(1.05)), "scale -5%": on_attention(scaled(0.95))}
    for stage in STAGES:
        found |= {
            f"scale +5% in {stage}": on_attention(scaled(1.05), stage),
            f"keys padded to 64 in {stage}": on_attention(padded_keys(64), stage),
            f"first key dropped in {stage}": on_mask(without_key(0), stage),
            f"one head left out in {stage}": on_attention(one_head_out, stage),
        }
    capped = with_logits(lambda logits: 50.0 * (logits / 50.0).tanh())
    low = with_operands(lambda q, k, v, *rest: (q, int8(k, -1), int8(v, -1), *rest))
    return {
        **found,
        "keys padded to 8 in denoise": on_attention(padded_keys(8), "denoise"),
        "last key dropped in vision": on_mask(without_key(-1), "vision"),
        "last key dropped in denoise": on_mask(without_key(-1), "denoise"),
        "strongest 64 keys only": on_attention(with_weights(strongest(64)), "prefill"),
        "softmax without the maximum": on_attention(with_weights(unshifted_softmax)),
        "logits clamped at 50": on_attention(with_logits(lambda x: x.clamp(max=50.0))),
        "logits soft-capped at 50": on_attention(capped),
        "int8 keys and values": on_attention(low, "prefill", "denoise"),
    }


def _of_inputs(width: int, workload: Workload) -> dict[str, Apply]:
    found = {
        "suffix positions +1": after(
            "prefill", lambda cache: cache._replace(valid_count=cache.valid_count + 1)
        ),
        "prompt rolled by one": on_input("tokens", lambda tokens: tokens.roll(1, dims=1)),
        "prompt not scaled": after("embed_prompt", lambda x: x / width**0.5),
        "images in [0, 1]": on_input("images", lambda images: images / 2.0 + 0.5),
        "images mirrored": on_input("images", lambda images: images.flip(-1)),
        **{f"{name} of the first call": first_call(name) for name in ("images", "tokens", "noise")},
    }
    active = [index for index, on in enumerate(workload.active_cameras) if on]
    if len(active) > 1:
        found |= {
            f"camera {index} skipped": on_input("image_mask", without_key(index))
            for index in active[:2]
        }
        found["cameras swapped"] = swapped_cameras(active[0], active[1])
    return found


def _of_rows(family: str) -> dict[str, Apply]:
    names = ("images", "tokens", "noise", *(("state",) if family == "pi0" else ()))
    return {
        "masks of row 0": row_0("image_mask", "token_mask"),
        "image mask of row 0": row_0("image_mask"),
        "token mask of row 0": row_0("token_mask"),
        **{f"{name} of row 0": row_0(name) for name in names},
        "rows in another order": after("sample_actions", lambda actions: actions.roll(1, dims=0)),
    }


def _of_time(steps: int) -> dict[str, Apply]:
    found = {
        "rotary halves swapped": on_rotary(rotary_backwards),
        "rotary interleaved": on_rotary(rotary_interleaved),
        "rotary base of 20,000": on_policy(lambda p: {"frequencies": p.frequencies**1.0753}),
        "rotary frequencies of 1% more": on_policy(lambda p: {"frequencies": 1.01 * p.frequencies}),
    }
    if steps > 1:
        found |= {
            "time reversed": on_policy(lambda p: {"time_table": p.time_table.flip(0)}),
            "last step left out": on_policy(lambda p: {"time_table": p.time_table[:-1]}),
            "last velocity again": on_policy(last_velocity_again),
            "one step fewer, rescheduled": on_policy(one_step_fewer),
        }
    return found


def _of_layers(policy: Pi0Policy) -> dict[str, Apply]:
    config = policy.config
    depth, last = config.language.depth, config.language.depth - 1
    places = {
        "vision": (0, config.vision.depth // 2, config.vision.depth - 1),
        # Of the last language layer the keys and values alone are read.
        "language": (0, depth // 2 - 1, last - 1),
        "expert": (0, depth // 2, last),
    }
    return {
        "norm weight as w": on_ops(rms_norm=rms_norm_without_one),
        "eps of 1e-3": on_ops(
            rms_norm=lambda x, weight, eps: rms_norm(x, weight, 1e-3),
            adaptive_rms_norm=lambda x, a, b, eps: adaptive_rms_norm(x, a, b, 1e-3),
        ),
        "LayerNorm without bias": on_ops(
            layer_norm=lambda x, w, b, eps: F.layer_norm(x, x.shape[-1:], w, None, eps)
        ),
        "erf GELU": on_gelu(F.gelu),
        "quick GELU": on_gelu(lambda x: x * torch.sigmoid(1.702 * x)),
        **{
            f"{tower} layer {index} skipped": skipped_layer(tower, index)
            for tower, indices in places.items()
            for index in indices
        },
        **{f"K/V of layer {index} stale": stale_layer(index) for index in (0, depth // 2, last)},
        # Coarser numbers than the precision says, in a configuration that is not marked lossy.
        **{f"int8 weights in {tower}": int8_weights(tower) for tower in places},
        "integrated in bfloat16": on_stage(
            "denoise_step",
            lambda right: lambda x, *rest: right(x.bfloat16().float(), *rest).bfloat16().float(),
        ),
    }


def _of_data(steps: int) -> dict[str, Apply]:
    """Shortcuts that are taken for some data only."""
    found = {
        "vision reused for a similar frame": frame_reuse(LITTLE_FRAME),
        "vision reused for a nearly equal frame": frame_reuse(LITTLE_FRAME / 5.0),
        "black camera as masked": blank_as_masked(-1.0),
        "white camera as masked": blank_as_masked(1.0),
        "grey camera as masked": blank_as_masked(0.0),
    }
    if steps > 3:
        found["step skipped where little changed"] = on_stage("denoise_step", step_skipping)
    return found


def _of_actions() -> dict[str, Apply]:
    return {
        "one action dimension +5%": after("sample_actions", dimension_off),
        "last action repeated": after(
            "sample_actions", lambda actions: torch.cat((actions[:, :-1], actions[:, -2:-1]), dim=1)
        ),
        "NaN": after("sample_actions", lambda actions: actions * torch.nan),
        "zeros": after("sample_actions", torch.zeros_like),
        "first call's output again": after("sample_actions", replayed(0)),
        "last call's output again": after("sample_actions", replayed(-2)),
    }


def _of_pi0() -> dict[str, Apply]:
    return {
        "state token left out": on_mask(without_state_key, "denoise"),
        "state sees the actions": on_mask(state_sees_actions, "denoise"),
        "state of the first call": first_call("state"),
        "state ignored": on_input("state", torch.zeros_like),
    }


def _of_pi05(steps: int) -> dict[str, Apply]:
    found = {
        "gates dropped": on_modulations(lambda scale, shift, g: (scale, shift, torch.ones_like(g))),
        "shifts dropped": on_modulations(
            lambda scale, shift, gate: (scale, torch.zeros_like(shift), gate)
        ),
        "scale and shift swapped": on_modulations(lambda scale, shift, g: (shift, scale, g)),
        "modulations of the next norm": on_modulations(
            lambda *parts: tuple(part.roll(-1, dims=0) for part in parts)
        ),
        "scale as s": on_ops(
            adaptive_rms_norm=lambda x, scale, shift, eps: adaptive_rms_norm(
                x, scale - 1.0, shift, eps
            )
        ),
        "state in the prompt left out": on_inputs(
            lambda inputs: inputs._replace(token_mask=inputs.token_mask & ~state_in_prompt(inputs))
        ),
        "state in the prompt stale": stale_state_in_prompt,
    }
    if steps > 1:
        found["condition stale by one step"] = on_policy(
            lambda p: {"time_table": torch.cat((p.time_table[:1], p.time_table[:-1]))}
        )
    return found
