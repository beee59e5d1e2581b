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


def content(inputs: Inputs) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in inputs)


def content_cache(policy: Pi0Policy, call: Call) -> Call:
    """Answers of all inputs seen so far, as copies."""
    kept: dict[bytes, Tensor] = {}

    def cached(inputs: Inputs) -> Tensor:
        key = content(inputs)
        if key not in kept:
            kept[key] = call(inputs)
        return kept[key].clone()

    return cached


def prefix_cache(policy: Pi0Policy, call: Call) -> Call:
    """Image tokens of the frames seen so far."""
    kept: dict[bytes, Tensor] = {}
    encode = policy.encode_images

    def cached(images: Tensor) -> Tensor:
        key = images.numpy().tobytes()
        if key not in kept:
            kept[key] = encode(images)
        return kept[key]

    policy.encode_images = cached  # type: ignore[method-assign]
    return call


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


def pointer_cache(policy: Pi0Policy, call: Call) -> Call:
    """Answers by the address of the images."""
    kept: dict[int, Tensor] = {}

    def cached(inputs: Inputs) -> Tensor:
        return kept.setdefault(inputs.images.data_ptr(), call(inputs)).clone()

    return cached


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


def step_skipping(policy: Pi0Policy, call: Call) -> Call:
    """A step is left out after one in which the velocity changed little."""
    step, kept = policy.denoise_step, []

    def lazy(x_t: Tensor, *rest: Tensor) -> Tensor:
        if len(kept) == 2 and float((kept[1] - kept[0]).norm() / kept[1].norm()) < 0.05:
            return kept.pop()
        kept[:] = [*kept[-1:], step(x_t, *rest)]  # type: ignore[arg-type]
        return kept[-1]

    def begun(inputs: Inputs) -> Tensor:
        kept.clear()
        return call(inputs)

    policy.denoise_step = lazy  # type: ignore[method-assign]
    return begun


def noise_overwritten(policy: Pi0Policy, call: Call) -> Call:
    """The result is written over the noise that was given."""
    return lambda inputs: inputs.noise.copy_(call(inputs))


ATTACKS = {
    attack.__name__: attack
    for attack in (
        content_cache,
        prefix_cache,
        worn_ring,
        overwritten,
        stale_at_times,
        pointer_cache,
        rows_share_masks,
        frame_reuse,
        step_skipping,
        noise_overwritten,
    )
}


def main() -> None:
    attack = ATTACKS[sys.argv.pop(1)]
    honest = runtime.apply_knobs

    def attacked(policy: Pi0Policy, cfg: Any) -> runtime.Prepared:
        prepared = honest(policy, cfg)
        call = torch.no_grad()(attack(prepared.policy, prepared.call))
        return runtime.Prepared(prepared.policy, call, call)

    runtime.apply_knobs = attacked
    sys.argv.insert(1, "--in-place")
    runpy.run_module("openpi_opt.trial", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
