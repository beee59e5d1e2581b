"""A trial whose policy cheats: `python attack.py NAME --config ... --result ...`.

NAME is one of `ATTACKS`; everything else is the trial itself. An attack does what an optimisation
that caches, races or leaves work out could do by mistake.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openpi_opt import runtime
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.policy import Pi0Policy

Call = Callable[[Inputs], Tensor]
Attack = Callable[[Pi0Policy, Call], Call]


def content(*tensors: Tensor) -> bytes:
    return b"".join(tensor.contiguous().view(-1).numpy().tobytes() for tensor in tensors)


def answers_by(key: Callable[[Inputs], object], after: int = 0) -> Attack:
    """Results are kept by a key, from some call on."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        kept: dict[object, Tensor] = {}
        count = 0

        def cached(inputs: Inputs) -> Tensor:
            nonlocal count
            count += 1
            if count <= after:
                return call(inputs)
            name = key(inputs)
            if name not in kept:
                kept[name] = call(inputs)
            return kept[name].clone()

        return cached

    return attack


def vision_by(key: Callable[[Tensor], object], after: int = 0) -> Attack:
    """Image tokens are kept by a key of the images, from some call on."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        kept: dict[object, Tensor] = {}
        encode, count = policy.encode_images, 0

        def cached(images: Tensor) -> Tensor:
            nonlocal count
            count += 1
            name = count if count <= after else key(images)
            if name not in kept:
                kept[name] = encode(images)
            return kept[name]

        policy.encode_images = cached  # type: ignore[method-assign]
        return call

    return attack


def kept_when_seen_twice(policy: Pi0Policy, call: Call) -> Call:
    """The third call with the same content is answered from a cache."""
    kept: dict[bytes, list[Tensor]] = {}

    def cached(inputs: Inputs) -> Tensor:
        known = kept.setdefault(content(*inputs), [])
        if len(known) < 2:
            known.append(call(inputs))
        return known[-1].clone()

    return cached


def answer_again_if_all_is_near(policy: Pi0Policy, call: Call) -> Call:
    """The last answer where no input has changed by much."""
    kept: list[Any] = []

    def lazy(inputs: Inputs) -> Tensor:
        if not kept or not all(
            float((new.float() - old.float()).abs().mean()) < 0.02
            for new, old in zip(inputs, kept[0], strict=True)
        ):
            kept[:] = [Inputs(*(tensor.clone() for tensor in inputs)), call(inputs)]
        return kept[1].clone()

    return lazy


def worn_ring(policy: Pi0Policy, call: Call) -> Call:
    """A ring of buffers that is used up after some calls."""
    count = 0

    def ring(inputs: Inputs) -> Tensor:
        nonlocal count
        count += 1
        return call(inputs) if count <= 30 else torch.zeros_like(inputs.noise)

    return ring


def overwritten(policy: Pi0Policy, call: Call) -> Call:
    """Two buffers in turn: the call after next overwrites a result."""
    buffers: list[Tensor] = []
    count = 0

    def aliased(inputs: Inputs) -> Tensor:
        nonlocal count
        count += 1
        if len(buffers) < 2:
            buffers.append(torch.empty_like(inputs.noise))
        return buffers[count % len(buffers)].copy_(call(inputs))

    return aliased


def stale_at_times(policy: Pi0Policy, call: Call) -> Call:
    """From the 40th call on, every 29th result is the one before: 3% of the calls."""
    kept: list[Tensor] = []
    count = 0

    def racing(inputs: Inputs) -> Tensor:
        nonlocal count
        count += 1
        actions = call(inputs)
        if count > 40 and count % 29 == 0:
            return kept[0].clone()
        kept[:] = [actions.clone()]
        return actions

    return racing


def stale_prefix_at_times(policy: Pi0Policy, call: Call) -> Call:
    """From the 30th call on every 25th takes keys and values of the call before."""
    prefill, encode = policy.prefill, policy.encode_images
    kept: dict[str, Any] = {}
    count = 0

    def stage(name: str, right: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Tensor) -> Any:
            if count < 30 or count % 25 or name not in kept:
                kept[name] = right(*given)
            return kept[name]

        return run

    def racing(inputs: Inputs) -> Tensor:
        nonlocal count
        count += 1
        return call(inputs)

    policy.encode_images = stage("vision", encode)  # type: ignore[method-assign]
    policy.prefill = stage("prefill", prefill)  # type: ignore[method-assign]
    return racing


def rows_share_masks(policy: Pi0Policy, call: Call) -> Call:
    """The masks of row 0 serve all rows."""

    def shared(inputs: Inputs) -> Tensor:
        masks = (inputs.image_mask, inputs.token_mask)
        image_mask, token_mask = (mask[:1].expand_as(mask) for mask in masks)
        return call(inputs._replace(image_mask=image_mask, token_mask=token_mask))

    return shared


def frame_reuse(policy: Pi0Policy, call: Call) -> Call:
    """Vision is reused for a frame that changed little."""
    kept: list[Tensor] = []
    encode = policy.encode_images

    def lazy(images: Tensor) -> Tensor:
        if not kept or float((images - kept[0]).abs().mean()) > 0.02:
            kept[:] = [images.clone(), encode(images)]
        return kept[1]

    policy.encode_images = lazy  # type: ignore[method-assign]
    return call


def step_skipping(little: float) -> Attack:
    """A step takes the velocity of the one before, where that had changed little."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        step = policy.denoise_step
        velocities: list[Tensor] = []

        def lazy(x_t: Tensor, *rest: Tensor) -> Tensor:
            if len(velocities) == 2:
                old, new = velocities
                if float((new - old).norm() / new.norm()) < little:
                    velocities.clear()
                    return x_t + new
            x_next = step(x_t, *rest)  # type: ignore[arg-type]
            velocities[:] = [*velocities[-1:], x_next - x_t]
            return x_next

        def begun(inputs: Inputs) -> Tensor:
            velocities.clear()
            return call(inputs)

        policy.denoise_step = lazy  # type: ignore[method-assign]
        return begun

    return attack


def ended_early(policy: Pi0Policy, call: Call) -> Call:
    """No further step after one that moved the actions by less than 1%."""
    step, done = policy.denoise_step, [False]

    def lazy(x_t: Tensor, *rest: Tensor) -> Tensor:
        if done[0]:
            return x_t
        x_next = step(x_t, *rest)  # type: ignore[arg-type]
        done[0] = float((x_next - x_t).norm() / x_next.norm()) < 0.01
        return x_next

    def begun(inputs: Inputs) -> Tensor:
        done[0] = False
        return call(inputs)

    policy.denoise_step = lazy  # type: ignore[method-assign]
    return begun


def clamped(policy: Pi0Policy, call: Call) -> Call:
    """What is integrated stays within 10."""
    step = policy.denoise_step
    policy.denoise_step = lambda *given: step(*given).clamp(-10, 10)  # type: ignore[method-assign]
    return call


def flat_patches_left_out(policy: Pi0Policy, call: Call) -> Call:
    """Image tokens of patches of one colour are zeros."""
    encode = policy.encode_images

    def pruned(images: Tensor) -> Tensor:
        patches = images.unfold(3, 14, 14).unfold(4, 14, 14)
        flat = patches.std((-1, -2)).amax(2).flatten(1) < 0.01
        return encode(images).masked_fill(flat[..., None], 0.0)

    policy.encode_images = pruned  # type: ignore[method-assign]
    return call


def noise_overwritten(policy: Pi0Policy, call: Call) -> Call:
    """The result is written over the noise that was given."""
    return lambda inputs: inputs.noise.copy_(call(inputs))


def images_overwritten(policy: Pi0Policy, call: Call) -> Call:
    """The call leaves the caller's frames in another range."""

    def careless(inputs: Inputs) -> Tensor:
        actions = call(inputs)
        inputs.images.mul_(0.5)
        return actions

    return careless


ATTACKS: dict[str, Attack] = {
    "content_cache": answers_by(lambda inputs: content(*inputs)),
    "prefix_cache": vision_by(content),
    "step_skipping": step_skipping(0.05),
    "rarely_skipping": step_skipping(0.01),
    "vision_by_one_camera": vision_by(lambda images: content(images[:, 0])),
    "vision_by_every_other_pixel": vision_by(lambda images: content(images[..., ::2, ::2])),
    "vision_by_address": vision_by(lambda images: images.data_ptr(), after=40),
    "answers_by_prompt": answers_by(lambda inputs: content(inputs.tokens), after=40),
    "answers_by_sums": answers_by(lambda i: tuple(round(float(t.sum()), 3) for t in i)),
    "answers_by_row_0": answers_by(lambda inputs: content(*(t[0] for t in inputs))),
    **{
        attack.__name__: attack
        for attack in (
            worn_ring,
            overwritten,
            stale_at_times,
            stale_prefix_at_times,
            rows_share_masks,
            frame_reuse,
            ended_early,
            clamped,
            flat_patches_left_out,
            kept_when_seen_twice,
            answer_again_if_all_is_near,
            noise_overwritten,
            images_overwritten,
        )
    },
}


def attacked(attack: Attack) -> Callable[[Pi0Policy, Any], runtime.Prepared]:
    """`runtime.apply_knobs` whose policies cheat."""
    honest = runtime.apply_knobs

    def apply(policy: Pi0Policy, cfg: Any) -> runtime.Prepared:
        prepared = honest(policy, cfg)
        call = torch.no_grad()(attack(prepared.policy, prepared.call))
        return runtime.Prepared(prepared.policy, call, call)

    return apply


def main() -> None:
    runtime.apply_knobs = attacked(ATTACKS[sys.argv.pop(1)])
    sys.argv.insert(1, "--in-place")
    runpy.run_module("openpi_opt.trial", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
