"""Policies that cheat, in real trials: each must end as `wrong`.

    python -m benchmarks.attacks --out attacks.jsonl [--kinds KIND ...] [--names NAME ...]

An attack does what an optimisation that caches, races, aliases or leaves work out could do by
mistake. Each runs as `python -m openpi_opt.trial` in a process of its own, on `pi0_mini` and a CPU,
and its outcome is written as it comes. The exit code is 1 if one does not end as `wrong`.
"""

from __future__ import annotations

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openpi_opt import cli, runtime
from openpi_opt.config import Config
from openpi_opt.guarding.mutations import (
    catalogue,
    int8,
    weighing,
    with_logits,
    with_operands,
    with_weights,
)
from openpi_opt.machine import probe
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.ops import Attention
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.workload import make_inputs

Call = Callable[[Inputs], Tensor]
Attack = Callable[[Pi0Policy, Call], Call]
Near = Callable[..., bool]

RAW: dict[str, Any] = {
    "model": {"name": "pi0_mini"},
    "platform": {"device": "cpu"},
    "workload": {
        "active_cameras": [True, True],
        "prompt_slots": 6,
        "prompt_tokens": 6,
        "steps": 4,
        "horizon": 4,
    },
    "profile": {"kernels": False, "energy": False, "roofline": "none"},
}
ON_FP8 = {"blas": {"backend": "fp8"}, "precision": {"dtype": "bfloat16"}}


def content(*tensors: Tensor) -> bytes:
    """All bits of the tensors."""
    flat = (t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors)
    return b"".join(tensor.numpy().tobytes() for tensor in flat)


def put(policy: Pi0Policy, stage: str, make: Callable[[Callable[..., Any]], Any]) -> None:
    """Replace a stage by what `make` makes of it."""
    setattr(policy, stage, make(getattr(policy, stage)))


def answers(key: Callable[[Inputs], object], after: int = 0, size: int = 10**6) -> Attack:
    """Results are kept by a key, from some call on, the last `size` of them."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        kept: dict[object, Tensor] = {}
        calls = 0

        def cached(inputs: Inputs) -> Tensor:
            nonlocal calls
            calls += 1
            name = ("new", calls) if calls <= after else key(inputs)
            if name not in kept:
                kept[name] = call(inputs).clone()
                if len(kept) > size:
                    del kept[next(iter(kept))]
            return kept[name].clone()

        return cached

    return attack


def stage_by(stage: str, key: Callable[..., object], after: int = 0) -> Attack:
    """What a stage returns is kept by a key of its arguments, from some call on."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        kept: dict[object, Any] = {}
        calls = 0

        def make(right: Callable[..., Any]) -> Callable[..., Any]:
            def cached(*given: Any) -> Any:
                nonlocal calls
                calls += 1
                name = ("new", calls) if calls <= after else key(*given)
                if name not in kept:
                    kept[name] = right(*given)
                return kept[name]

            return cached

        put(policy, stage, make)
        return call

    return attack


def reused(stage: str, near: Near, every: int = 1, after: int = 0) -> Attack:
    """The last result again where the first argument is near that of its call.

    The stage `answers` is the whole call. `every`: at most so many times in a row.
    """

    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        kept: list[Any] = []
        calls, times = 0, 0

        def lazy(*given: Any) -> Any:
            nonlocal calls, times
            calls += 1
            if kept and calls > after and times < every and near(given[0], kept[0]):
                times += 1
            else:
                old = given[0]
                copy = Inputs(*(t.clone() for t in old)) if stage == "answers" else old.clone()
                kept[:], times = [copy, right(*given)], 0
            return kept[1].clone() if stage == "answers" else kept[1]

        return lazy

    def attack(policy: Pi0Policy, call: Call) -> Call:
        if stage == "answers":
            return make(call)  # type: ignore[no-any-return]
        put(policy, stage, make)
        return call

    return attack


def nearer(limit: float) -> Near:
    """Whether two tensors differ by less than `limit` in the mean."""
    return lambda new, old: float((new.float() - old.float()).abs().mean()) < limit


def at_times(every: int, start: int, wrong: Callable[[Tensor, Tensor], Tensor]) -> Attack:
    """From call `start` on each `every`-th is wrong: `wrong` gets its result and the one before."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        before: list[Tensor] = []
        calls = 0

        def racing(inputs: Inputs) -> Tensor:
            nonlocal calls
            calls += 1
            actions = call(inputs)
            if calls > start and calls % every == 0:
                return wrong(actions, before[0])
            before[:] = [actions.clone()]
            return actions

        return racing

    return attack


def stale_stage(stage: str, every: int, start: int) -> Attack:
    """From call `start` on each `every`-th takes what the stage gave the call before; work is done.

    Nothing is saved, as in a race.
    """

    def attack(policy: Pi0Policy, call: Call) -> Call:
        kept: list[Any] = []
        calls = 0

        def make(right: Callable[..., Any]) -> Callable[..., Any]:
            def racing(*given: Any) -> Any:
                found = right(*given)
                stale = calls > start and calls % every == 0 and len(kept) > 0
                return kept[0] if stale else (kept.__setitem__(slice(None), [found]), found)[1]

            return racing

        def counted(inputs: Inputs) -> Tensor:
            nonlocal calls
            calls += 1
            return call(inputs)

        put(policy, stage, make)
        return counted

    return attack


def ring(count: int, view: bool = False) -> Attack:
    """Results lie in `count` buffers in turn, with `view` in one piece of memory."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        buffers: list[Tensor] = []
        calls = 0

        def cycling(inputs: Inputs) -> Tensor:
            nonlocal calls
            if not buffers:
                shape = (count, *inputs.noise.shape)
                whole = torch.empty(shape)
                buffers.extend(whole.unbind() if view else [b.clone() for b in whole.unbind()])
            calls += 1
            return buffers[calls % count].copy_(call(inputs))

        return cycling

    return attack


def worn(after: int, wrong: Callable[[Inputs, Tensor], Tensor]) -> Attack:
    """From some call on all is wrong; `wrong` gets the inputs and the last right result."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        last: list[Tensor] = []
        calls = 0

        def used_up(inputs: Inputs) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > after:
                return wrong(inputs, last[0])
            last[:] = [call(inputs).clone()]
            return last[0].clone()

        return used_up

    return attack


def late_write(seconds: float) -> Attack:
    """A thread puts the result into the buffer that was already handed out."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        def early(inputs: Inputs) -> Tensor:
            actions = call(inputs)
            buffer = torch.zeros_like(actions)
            threading.Timer(seconds, buffer.copy_, [actions]).start()
            return buffer

        return early

    return attack


def written(name: str, change: Callable[[Tensor], object], returned: bool = False) -> Attack:
    """The caller's tensor is changed in place after the call, or with `returned` is the result."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        def careless(inputs: Inputs) -> Tensor:
            actions = call(inputs)
            given: Tensor = getattr(inputs, name)
            if returned:
                return given.view(-1)[: actions.numel()].view_as(actions).copy_(actions)
            change(given)
            return actions

        return careless

    return attack


def outputs(change: Callable[[Tensor, list[Tensor]], Tensor]) -> Attack:
    """What is returned is changed; the list keeps what an earlier call left."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        kept: list[Tensor] = []
        return lambda inputs: change(call(inputs), kept)

    return attack


def inputs(change: Callable[[Inputs], Inputs]) -> Attack:
    """The policy gets other inputs."""
    return lambda policy, call: lambda given: call(change(given))


def rows(name: str, change: Callable[[Tensor], Tensor]) -> Attack:
    """One input of all rows is what `change` makes of it."""
    return inputs(lambda i: i._replace(**{name: change(getattr(i, name)).clone()}))


def stale_masks(start: int, stop: int) -> Attack:
    """In calls `start` to `stop` masks are those of the first call: a graph that copies none."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        kept: list[Inputs] = []
        calls = 0

        def replayed(given: Inputs) -> Tensor:
            nonlocal calls
            calls += 1
            if not kept:
                kept.append(Inputs(*(tensor.clone() for tensor in given)))
            if start <= calls <= stop:
                masks = {name: getattr(kept[0], name) for name in ("image_mask", "token_mask")}
                return call(given._replace(**masks))
            return call(given)

        return replayed

    return attack


def rows_in(stage: str, place: int) -> Attack:
    """One stage gets the first row's tensor for all rows at one place of its arguments."""

    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        def shared(*given: Any) -> Any:
            parts = list(given)
            parts[place] = parts[place][:1].expand_as(parts[place])
            return right(*parts)

        return shared

    return staged(stage, make)


def staged(stage: str, make: Callable[[Callable[..., Any]], Any]) -> Attack:
    """A stage is replaced."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        put(policy, stage, make)
        return call

    return attack


def steps(rule: Callable[[Tensor, Tensor, Tensor], Tensor | None], after: int = 0) -> Attack:
    """`rule` of the last two velocities and x_t gives the next velocity, or None: compute it."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        moved: list[Tensor] = []
        calls = 0

        def make(right: Callable[..., Any]) -> Callable[..., Any]:
            def lazy(x_t: Tensor, *rest: Any) -> Tensor:
                if len(moved) >= 2 and calls > after:
                    velocity = rule(moved[-2], moved[-1], x_t)
                    if velocity is not None:
                        moved.clear()
                        return x_t + velocity
                x_next: Tensor = right(x_t, *rest)
                moved.append(x_next - x_t)
                return x_next

            return lazy

        def begun(given: Inputs) -> Tensor:
            nonlocal calls
            calls += 1
            moved.clear()
            return call(given)

        put(policy, "denoise_step", make)
        return begun

    return attack


def ended(done: Callable[[Tensor, Tensor], bool]) -> Attack:
    """No further step after one from x to y for which `done` says so."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        over = False

        def make(right: Callable[..., Any]) -> Callable[..., Any]:
            def lazy(x_t: Tensor, *rest: Any) -> Tensor:
                nonlocal over
                if over:
                    return x_t
                x_next: Tensor = right(x_t, *rest)
                over = done(x_t, x_next)
                return x_next

            return lazy

        def begun(given: Inputs) -> Tensor:
            nonlocal over
            over = False
            return call(given)

        put(policy, "denoise_step", make)
        return begun

    return attack


def expert_layer_kept(index: int) -> Attack:
    """A layer of the expert adds in later steps what it added in the first."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        kept: list[Tensor] = []
        layer = policy.expert.layers[index]
        right = layer.forward

        def lazy(x: Tensor, *rest: Any) -> tuple[Tensor, Any]:
            out, cache = right(x, *rest)
            if not kept:
                kept.append(out - x)
            return x + kept[0], cache

        def begun(given: Inputs) -> Tensor:
            kept.clear()
            return call(given)

        layer.forward = lazy  # type: ignore[method-assign, assignment]
        return begun

    return attack


def ops(**values: Any) -> Attack:
    """Operations are replaced; an `Attention` for `attention` replaces it in all stages."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        for name, value in values.items():
            stages = ("vision", "prefill", "denoise") if name == "attention" else ("",)
            for stage in stages:
                setattr(policy.ops, f"{name}_{stage}".rstrip("_"), value)
        return call

    return attack


def mutation(name: str) -> Attack:
    """A mistake of `guarding.mutations`."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        workload = runtime.workload_of(config(f"FP8 and {name}"))
        (found,) = [m for m in catalogue(policy, workload) if m.name == name]
        return found.candidate(policy, make_inputs(workload, policy.config, 987, policy.device))

    return attack


def fp8_layers(
    change: Callable[[Any, Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]],
) -> Attack:
    """Layers in FP8 get another `forward`; `change` gets a layer and the right one."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        for module in policy.modules():
            if type(module).__name__ == "Fp8Linear":
                module.forward = change(module, module.forward)
        return call

    return attack


def row_0_scale(layer: Any, right: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Inputs are scaled by the largest value of the call's first row of the product."""

    def forward(x: Tensor) -> Tensor:
        first = x.reshape(-1, x.shape[-1])[0].abs().amax().float()
        layer.input_scale.copy_(first.clamp_min(1e-12) / 448.0)
        return right(x)

    return forward


def short_sums(layer: Any, right: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The product is summed in bfloat16 over pieces of 32."""

    def forward(x: Tensor) -> Tensor:
        scale, weight = layer.input_scale, layer.weight_fp8.float() * layer.weight_scale
        rows = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        out = torch.zeros(*x.shape[:-1], len(weight), dtype=torch.bfloat16)
        for part, piece in zip(rows.split(32, -1), weight.split(32, 1), strict=True):
            out = out + (part @ piece.T).bfloat16()
        out = out if layer.bias is None else out + layer.bias.to(out.dtype)
        return out.to(x.dtype)

    return forward


def blocks(images: Tensor, size: int) -> Tensor:
    """Means of squares of `size` pixels, [B, C, 3, h, w]."""
    return F.avg_pool2d(images.flatten(0, 1), size).unflatten(0, images.shape[:2])


def flat(images: Tensor) -> Tensor:
    """[B, C * 256] whether a patch has one colour."""
    patches = images.unfold(3, 14, 14).unfold(4, 14, 14)
    return patches.std((-1, -2)).amax(2).flatten(1) < 0.01


def per_camera(right: Callable[..., Any]) -> Callable[..., Any]:
    """Image tokens of each camera kept by its own content."""
    kept: dict[bytes, Tensor] = {}

    def encode(images: Tensor) -> Tensor:
        names = [content(images[:, c]) for c in range(images.shape[1])]
        if any(name not in kept for name in names):
            parts = right(images).chunk(len(names), 1)
            kept.update(zip(names, parts, strict=True))
        return torch.cat([kept[name] for name in names], 1)

    return encode


def changed_patches(limit: float) -> Attack:
    """Image tokens of patches that changed by less than `limit` stay as they were."""

    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        kept: list[Tensor] = []

        def lazy(images: Tensor) -> Tensor:
            tokens: Tensor = right(images)
            if kept:
                same = blocks((images - kept[0]).abs(), 14).mean(2).flatten(1) < limit
                tokens = torch.where(same[..., None], kept[1], tokens)
            kept[:] = [images.clone(), tokens]
            return tokens

        return lazy

    return staged("encode_images", make)


def averaged_frames(right: Callable[..., Any]) -> Callable[..., Any]:
    """Frames are a running mean with the one before, where they are near."""
    kept: list[Tensor] = []

    def encode(images: Tensor) -> Any:
        near = kept and float((images - kept[0]).abs().mean()) < 0.05
        given = (images + kept[0]) / 2 if near else images
        kept[:] = [images.clone()]
        return right(given)

    return encode


def unshifted(logits: Tensor) -> Tensor:
    """A softmax that does not subtract the maximum, and guards against overflow instead."""
    shares = logits.clamp(max=80.0).exp()
    return shares / shares.sum(-1, keepdim=True).clamp_min(1e-30)


def pruned(share: float) -> Attention:
    """Softmax weights below `share` are left out, the others are not scaled up."""
    return with_weights(lambda logits: F.threshold(logits.softmax(-1), share, 0.0))


def blank(level: float, spread: float) -> Attack:
    """A camera whose frame is about one level everywhere counts as masked."""

    def change(given: Inputs) -> Inputs:
        near = (given.images - level).abs().amax((2, 3, 4)) <= spread
        return given._replace(image_mask=given.image_mask & ~near)

    return inputs(change)


def left_half(tensor: Tensor) -> Tensor:
    """The first half of the last axis."""
    return tensor[..., : tensor.shape[-1] // 2]


def first_images_mask(right: Callable[..., Any]) -> Callable[..., Any]:
    """The cameras' mask of the first call serves all."""
    kept: list[Tensor] = []

    def prefill(tokens: Tensor, prompt: Tensor, image_mask: Tensor, *given: Any) -> Any:
        kept.append(image_mask.clone())
        return right(tokens, prompt, kept[0], *given)

    return prefill


def rows_of_count(right: Callable[..., Any]) -> Callable[..., Any]:
    """The suffix of all rows stands where that of row 0 does."""

    def prefill(*given: Any) -> Any:
        cache = right(*given)
        return cache._replace(valid_count=cache.valid_count[:1].expand_as(cache.valid_count))

    return prefill


def rows_of_mask(right: Callable[..., Any]) -> Callable[..., Any]:
    """In denoising all rows see what row 0 sees of the prefix."""

    def prefill(*given: Any) -> Any:
        cache = right(*given)
        return cache._replace(mask=cache.mask[:1].expand_as(cache.mask))

    return prefill


def relative(new: Tensor, old: Tensor) -> float:
    """The L2 distance of two tensors, of the first one's norm."""
    return float((new - old).norm() / new.norm())


def with_work_done(stage: str, same: Callable[[Tensor, Tensor], Tensor]) -> Attack:
    """The stage runs, and gives the result before this where its first argument is the `same`.

    `same` answers on the device: a captured graph can do that, and saves nothing that is seen.
    """

    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        kept: list[Tensor] = []

        def chosen(*given: Any) -> Tensor:
            found: Tensor = right(*given)
            if kept:
                found = torch.where(same(given[0], kept[0]), kept[1], found)
            kept[:] = [given[0].clone(), found]
            return found

        return chosen

    return staged(stage, make)


def equal_in(part: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Whether a part of two tensors is the same."""
    return lambda new, old: (part(new) == part(old)).all()


def later(after: int, attack: Attack) -> Attack:
    """The right policy for some calls, then the one of `attack`, which sees all calls."""

    def changed(policy: Pi0Policy, call: Call) -> Call:
        calls, stages = 0, ("encode_images", "prefill", "denoise_step")
        right = {name: getattr(policy, name) for name in stages}
        own = dict(vars(policy.ops))
        wrong = attack(policy, call)
        cheating = {name: getattr(policy, name) for name in stages}
        others = dict(vars(policy.ops))

        def worn_out(given: Inputs) -> Tensor:
            nonlocal calls
            calls += 1
            vars(policy).update(right if calls <= after else cheating)
            vars(policy.ops).update(own if calls <= after else others)
            return call(given) if calls <= after else wrong(given)

        return worn_out

    return changed


def kept_for(seconds: float, key: Callable[[Inputs], object]) -> Attack:
    """Results are kept by a key for some time."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        kept: dict[object, tuple[float, Tensor]] = {}

        def cached(given: Inputs) -> Tensor:
            name, now = key(given), time.monotonic()
            if name not in kept or now - kept[name][0] > seconds:
                kept[name] = (now, call(given).clone())
            return kept[name][1].clone()

        return cached

    return attack


def sometimes_shared(every: int) -> Attack:
    """Every so many calls the result lies in a buffer that the next of these overwrites."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        buffers: list[Tensor] = []
        calls = 0

        def careless(given: Inputs) -> Tensor:
            nonlocal calls
            calls += 1
            actions = call(given)
            if calls % every:
                return actions
            if not buffers:
                buffers.append(torch.empty_like(actions))
            return buffers[0].copy_(actions)

        return careless

    return attack


def in_a_thread(wait: float) -> Attack:
    """Image tokens come from a thread; after `wait` seconds those of the call before serve."""

    def make(right: Callable[..., Any]) -> Callable[..., Any]:
        kept: list[Tensor] = []

        def encode(images: Tensor) -> Tensor:
            def work() -> None:
                with torch.no_grad():
                    kept[:] = [right(images)]

            thread = threading.Thread(target=work)
            thread.start()
            thread.join(wait if kept else None)
            return kept[0]

        return encode

    return staged("encode_images", make)


def by_address(names: Sequence[str]) -> Attack:
    """Some inputs are read once for each address, as one copies masks to the host only once."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        kept: dict[tuple[str, int], Tensor] = {}

        def read(given: Inputs) -> Tensor:
            known = {
                name: kept.setdefault(
                    (name, getattr(given, name).data_ptr()), getattr(given, name).clone()
                )
                for name in names
            }
            return call(given._replace(**known))

        return read

    return attack


def of_the_call_before(*names: str) -> Attack:
    """Some inputs are those of the call before."""

    def attack(policy: Pi0Policy, call: Call) -> Call:
        kept: dict[str, Tensor] = {}

        def stale(given: Inputs) -> Tensor:
            now = {name: getattr(given, name).clone() for name in names}
            old = {**now, **kept}
            kept.update(now)
            return call(given._replace(**old))

        return stale

    return attack


def like_row_0(name: str, take: Sequence[str]) -> Attack:
    """Rows whose input `name` is that of row 0 get its other inputs, too."""

    def change(given: Inputs) -> Inputs:
        tensor = getattr(given, name).flatten(1)
        same = (tensor == tensor[:1]).all(1)

        def merged(other: Tensor) -> Tensor:
            shape = (-1, *[1] * (other.ndim - 1))
            return torch.where(same.view(shape), other[:1], other)

        return given._replace(**{other: merged(getattr(given, other)) for other in take})

    return inputs(change)


def alike_cameras(limit: float) -> Attack:
    """A camera that sees nearly what the first one sees gets its frame."""

    def change(given: Inputs) -> Inputs:
        first = given.images[:, :1]
        near = (given.images - first).abs().mean((2, 3, 4), keepdim=True) < limit
        return given._replace(images=torch.where(near, first, given.images))

    return inputs(change)


def cache_in_denoise(change: Callable[[Any], Any]) -> Attack:
    """Denoising gets another cache of the prefix."""
    return staged("prefill", lambda right: lambda *given: change(right(*given)))


# fmt: off
KINDS: dict[str, dict[str, Attack]] = {
    "content cache": {
        "answers by content": answers(lambda i: content(*i)),
        "the last 1 answer": answers(lambda i: content(*i), size=1),
        "the last 4 answers, after 50 calls": answers(lambda i: content(*i), 50, 4),
        "answers by noise": answers(lambda i: content(i.noise)),
        "answers by state and prompt": answers(lambda i: content(i.state, i.tokens)),
        "answers by row 0": answers(lambda i: content(*(t[0] for t in i))),
        "answers by sums": answers(lambda i: tuple(round(float(t.sum()), 3) for t in i)),
        "answers by rounded pixels": answers(lambda i: content((i.images * 8).round(), i.state,
            i.tokens, i.noise)),
        "answers by means of blocks": answers(lambda i: content((blocks(i.images, 28) * 16).round(),
            i.state, i.tokens, i.noise)),
        "vision by content": stage_by("encode_images", content),
        "vision by every other pixel": stage_by("encode_images", lambda x: content(x[..., ::2,
            ::2])),
        "vision by one camera": stage_by("encode_images", lambda x: content(x[:, 0])),
        "vision by half the width": stage_by("encode_images", lambda x: content(left_half(x))),
        "vision by camera": staged("encode_images", per_camera),
        "keys and values by prompt": stage_by("prefill", lambda x, *rest: content(rest[0])),
        "keys and values by content": stage_by("prefill", content),
        "prompt by content": stage_by("embed_prompt", content),
        "state by content": stage_by("embed_state", content),
        "steps by content": stage_by("denoise_step", lambda x, f, s, c: content(x, f)),
    },
    "ring": {
        **{f"ring of {count} buffers": ring(count) for count in (1, 2, 5, 16, 33, 64)},
        "ring of 3 in one piece of memory": ring(3, view=True),
        "ring of 48 in one piece of memory": ring(48, view=True),
        "zeros after 30 calls": worn(30, lambda i, last: torch.zeros_like(last)),
        "noise after 70 calls": worn(70, lambda i, last: i.noise.clone()),
        "the last answer after 45 calls": worn(45, lambda i, last: last.clone()),
        "every 29th is the one before": at_times(29, 40, lambda a, old: old.clone()),
        "every 41st is half the one before": at_times(41, 20, lambda a, old: (a + old) / 2),
        "every 23rd has a row of the one before": at_times(23, 30, lambda a, old: torch.cat((a[:1],
            old[1:]))),
        "every 37th ends with the one before": at_times(37, 10, lambda a, old: torch.cat((a[:, :-1],
            old[:, -1:]), 1)),
        "every 25th prefix is the one before": stale_stage("prefill", 25, 30),
        "every 21st vision is the one before": stale_stage("encode_images", 21, 30),
        "written after 1 ms": late_write(0.001),
        "written after 2 s": late_write(2.0),
    },
    "alias": {
        "the noise is the result": written("noise", lambda t: None, returned=True),
        "the result lies in the frames": written("images", lambda t: None, returned=True),
        "the frames are scaled": written("images", lambda t: t.mul_(0.5)),
        "one pixel is changed": written("images", lambda t: t[-1, -1, -1, -1, -1:].add_(1e-3)),
        "the state is normalised": written("state", lambda t: t.clamp_(-1.0, 1.0)),
        "the prompt is padded": written("tokens", lambda t: t[:, -1:].zero_()),
        "the noise is used up": written("noise", lambda t: t.zero_()),
        "the masks are cleared": written("token_mask", lambda t: t[-1, -1:].logical_not_()),
        "one buffer": outputs(lambda a, kept: (kept or kept.append(a.clone()) or kept)[0].copy_(a)),
        "the result before this is shifted": outputs(lambda a, kept: ([old.mul_(0.9) for old in
            kept], kept.__setitem__(slice(None), [a]), a)[-1]),
        "the result before this is overwritten": outputs(lambda a, kept: ([old.copy_(a) for old in
            kept], kept.__setitem__(slice(None), [a]), a)[-1]),
        "results overlap": outputs(lambda a, kept: ((kept or kept.append(torch.zeros(2 * a.numel()))
            or kept)[0][5 : 5 + a.numel()] .view_as(a) .copy_(a))),
    },
    "pointer key": {
        **{f"answers by the address of the {name}": answers(lambda i, name=name: getattr(i,
            name).data_ptr(), 20) for name in ("images", "noise", "tokens", "state")},
        "answers by all addresses": answers(lambda i: tuple(t.data_ptr() for t in i)),
        "answers by address and version": answers(lambda i: (i.noise.data_ptr(), i.noise._version)),
        "answers by id": answers(lambda i: id(i.images), 10),
        "vision by address": stage_by("encode_images", lambda x: x.data_ptr()),
        "vision by address, after 60 calls": stage_by("encode_images", lambda x: x.data_ptr(), 60),
        "prompt by address": stage_by("embed_prompt", lambda x: x.data_ptr()),
        "state by address": stage_by("embed_state", lambda x: x.data_ptr()),
        "prefix by address of the prompt": stage_by("prefill", lambda x, *rest: rest[0].data_ptr()),
        "prefix by id of the prompt": stage_by("prefill", lambda x, *rest: id(rest[0]), 20),
    },
    "row-0 masks": {
        "masks of row 0": inputs(lambda i:
            i._replace(image_mask=i.image_mask[:1].expand_as(i.image_mask),
            token_mask=i.token_mask[:1].expand_as(i.token_mask))),
        "image mask of row 0": rows("image_mask", lambda m: m[:1].expand_as(m)),
        "token mask of row 0": rows("token_mask", lambda m: m[:1].expand_as(m)),
        "image mask of the last row": rows("image_mask", lambda m: m[-1:].expand_as(m)),
        "image masks of any row": rows("image_mask", lambda m: m.any(0, True).expand_as(m)),
        "token masks of all rows": rows("token_mask", lambda m: m.all(0, True).expand_as(m)),
        "longest prompt for all": rows("token_mask", lambda m:
            m[m.sum(1).argmax()][None].expand_as(m)),
        "masks in another order": rows("image_mask", lambda m: m.flip(0)),
        "positions of row 0": staged("prefill", rows_of_count),
        "row 0's mask in denoise": staged("prefill", rows_of_mask),
        "prompt of row 0": rows_in("prefill", 1),
        "image mask of the first call": staged("prefill", first_images_mask),
        "state of row 0": rows("state", lambda s: s[:1].expand_as(s)),
        "last row's frames of row 0": rows("images", lambda x: torch.cat((x[:-1], x[:1])) if len(x)
            > 1 else x),
        "first camera for all": rows("image_mask", lambda m: m[:, :1].expand_as(m)),
    },
    "masks of the first call": {
        # The structure is asked in fewer calls, and the cases are asked again after them.
        "first masks after 21 calls": stale_masks(22, 10**6),
        "first masks after 21 calls, 70 at most": stale_masks(22, 70),
        "first masks after 21 calls, 70 at most, flexible": stale_masks(22, 70),
        "first masks after 21 calls, 70 at most, 3 rows": stale_masks(22, 70),
    },
    "frame reuse": {
        **{f"frames within {limit}": reused("encode_images", nearer(limit)) for limit in (0.02,
            0.005, 0.001)},
        "frames of which most pixels are equal": reused("encode_images", lambda new, old: float((new
            == old).float().mean()) > 0.9),
        "frames whose blocks are near": reused("encode_images", lambda n, o: float((blocks(n, 28) -
            blocks(o, 28)).abs().max()) < 0.05),
        "last frames where the first camera is the same": reused("encode_images", lambda new, old:
            bool(torch.equal(new[:, 0], old[:, 0]))),
        "once in a row": reused("encode_images", nearer(0.02), every=1, after=5),
        "every other call": reused("encode_images", lambda new, old: True, every=1, after=40),
        "patches within 0.004": changed_patches(0.004),
        "patches within 0.02": changed_patches(0.02),
        "running mean of near frames": staged("encode_images", averaged_frames),
        "prefix where frames are near": reused("prefill", nearer(0.05)),
        "answers where the frames are near": reused("answers", lambda new, old: float((new.images -
            old.images).abs().mean()) < 0.02),
        "answers where all is near": reused("answers", lambda new, old: all(float((a.float() -
            b.float()).abs().mean()) < 0.02 for a, b in zip(new, old, strict=True))),
        "answers where the state is near": reused("answers", lambda new, old: float((new.state -
            old.state).abs().max()) < 0.05),
    },
    "step skipping": {
        **{f"velocity within {limit}": steps(lambda a, b, x, limit=limit: b if relative(b, a) <
            limit else None) for limit in (0.05, 0.02, 0.01)},
        "velocity within 0.02, after 50 calls": steps(lambda a, b, x: b if relative(b, a) < 0.02
            else None, 50),
        "same direction": steps(lambda a, b, x: (b if float(F.cosine_similarity(a.flatten(),
            b.flatten(), 0)) > 0.9999 else None)),
        "extrapolated velocity": steps(lambda a, b, x: 2 * b - a if relative(b, a) < 0.02 else
            None),
        "mean velocity": steps(lambda a, b, x: (a + b) / 2 if relative(b, a) < 0.02 else None),
        "small moves end it": ended(lambda x, y: relative(y, x) < 0.01),
        "small moves of row 0 end it": ended(lambda x, y: relative(y[:1], x[:1]) < 0.01),
        "small values end it": ended(lambda x, y: float((y - x).abs().max()) < 0.05),
        "always the third step": steps(lambda a, b, x: b),
        "first expert layer kept": expert_layer_kept(0),
        "last expert layer kept": expert_layer_kept(3),
        "steps by rounded content": stage_by("denoise_step", lambda x, f, s, c: content((x *
            64).round(), f)),
        "every 20th call ends early": at_times(20, 20, lambda a, old: 0.98 * a),
    },
    "data-dependent shortcut": {
        "actions within 10": staged("denoise_step", lambda f: lambda *g: f(*g).clamp(-10, 10)),
        "logits within 30": ops(attention=with_logits(lambda x: x.clamp(-30, 30))),
        "logits within 60": ops(attention=with_logits(lambda x: x.clamp(max=60))),
        "softmax without the maximum": ops(attention=with_weights(unshifted)),
        "weights below 1e-3 left out": ops(attention=pruned(1e-3)),
        "weights below 1e-4 left out": ops(attention=pruned(1e-4)),
        "weights below 1e-6 left out": ops(attention=pruned(1e-6)),
        "black cameras": blank(-1.0, 0.01),
        "grey cameras": blank(0.0, 0.01),
        "dark cameras": blank(-1.0, 0.2),
        "flat patches are zeros": staged("encode_images", lambda f: lambda x:
            f(x).masked_fill(flat(x)[..., None], 0.0)),
        "token 0 is padding": inputs(lambda i: i._replace(token_mask=i.token_mask & (i.tokens !=
            0))),
        "no state where it is zero": inputs(lambda i: i._replace(state=torch.where(i.state == 0,
            0.1, i.state))),
        "large noise is clipped": inputs(lambda i: i._replace(noise=i.noise.clamp(-6, 6))),
        "large state is clipped": inputs(lambda i: i._replace(state=i.state.clamp(-2, 2))),
        "pixels in 8 bits": inputs(lambda i: i._replace(images=(i.images * 127.5).round() / 127.5)),
        "state in 16 bits": inputs(lambda i: i._replace(state=i.state.bfloat16().float())),
        "GELU's tail cut at -4": ops(gelu=lambda x: F.gelu(x, approximate="tanh") * (x > -4),
            gelu_mul=lambda g, u: F.gelu(g, approximate="tanh") * (g > -4) * u),
        "keys in 8 bits": ops(attention_denoise=with_operands(lambda q, k, *rest: (q, int8(k, -1),
            *rest))),
    },
    "bug on top of FP8": {
        **{f"FP8 and {name}": mutation(name) for name in ("suffix positions +1",
            "last step left out", "time reversed", "scale +5%", "erf GELU", "eps of 1e-3",
            "first key dropped in denoise", "masks of row 0", "int8 keys and values",
            "step skipped where little changed", "one action dimension +5%")},
        "FP8 and answers by content": answers(lambda i: content(*i)),
        "FP8 and a bias left out": fp8_layers(lambda m, f: (lambda x: f(x) - m.bias.to(x.dtype)) if
            m.bias is not None else f),
        "FP8 with 2% too much": fp8_layers(lambda m, f: lambda x: 1.02 * f(x)),
        "FP8 with a scale for half the range": fp8_layers(lambda m, f: (m.input_scale.mul_(0.25),
            f)[1]),
        "FP8 with weights 3% too large": fp8_layers(lambda m, f: (m.weight_scale.mul_(1.03), f)[1]),
        "FP8 with a row of weights left out": fp8_layers(lambda m, f: lambda x: F.pad(f(x)[..., 1:],
            (1, 0))),
        "FP8 by content of vision": stage_by("encode_images", content),
    },
    "mixed": {
        "answers by sorted pixels": answers(lambda i: content(i.images.flatten().sort().values,
            i.state, i.tokens, i.noise.flatten().sort().values)),
        "answers by the middle of the frames": answers(lambda i: content(i.images[..., 56:168,
            56:168], i.state, i.tokens, i.noise)),
        "answers by the last row": answers(lambda i: content(*(t[-1] for t in i))),
        "answers by all but the state's sign": answers(lambda i: content(i.images, i.state.abs(),
            i.tokens, i.noise)),
        "answers kept for 2 s": kept_for(2.0, lambda i: content(*i)),
        "keys and values by image tokens": stage_by("prefill", lambda x, *rest: content(x)),
        "vision where the upper half is equal": with_work_done("encode_images",
            equal_in(lambda x: x[..., :112, :])),
        "vision where the left half is equal": with_work_done("encode_images",
            equal_in(left_half)),
        "vision where the first patches are equal": with_work_done("encode_images",
            equal_in(lambda x: x[..., :14, :14])),
        "vision where 3 of 4 pixels are equal": with_work_done("encode_images",
            lambda new, old: (new == old).float().mean() > 0.75),
        "every 10th result shares a buffer": sometimes_shared(10),
        "every 17th result shares a buffer": sometimes_shared(17),
        "ring of 100 buffers": ring(100),
        "vision in a thread, 5 ms": in_a_thread(0.005),
        "vision in a thread, 200 ms": in_a_thread(0.2),
        "masks by address": by_address(("image_mask", "token_mask")),
        "prompt by address of its tokens": by_address(("tokens",)),
        "masks of the call before": of_the_call_before("image_mask", "token_mask"),
        "state of the call before": of_the_call_before("state"),
        "any row's mask in denoise": cache_in_denoise(lambda c: c._replace(mask=None if c.mask is
            None else c.mask.any(0, True).expand_as(c.mask))),
        "last row's position for all": cache_in_denoise(lambda c: c._replace(
            valid_count=c.valid_count[-1:].expand_as(c.valid_count))),
        "row with the noise of row 0": like_row_0("noise", ("state", "images", "tokens")),
        "row with the prompt of row 0": like_row_0("tokens", ("images", "image_mask")),
        "row with the frames of row 0": like_row_0("images", ("tokens", "token_mask")),
        "row with the state of row 0": like_row_0("state", ("images", "image_mask")),
        "cameras that see nearly the same": alike_cameras(0.05),
        "repeated tokens are padding": inputs(lambda i: i._replace(token_mask=i.token_mask &
            ~F.pad(i.tokens[:, 1:] == i.tokens[:, :-1], (1, 0), value=False))),
        "the last token of the vocabulary is wrapped": inputs(lambda i: i._replace(tokens=i.tokens %
            1023)),
        "state within 5": rows("state", lambda s: s.clamp(-5, 5)),
        "noise within 10": rows("noise", lambda n: n.clamp(-10, 10)),
        "noise in float16": rows("noise", lambda n: n.half().float()),
        "frames in float16": rows("images", lambda x: x.half().float()),
        "tokens in 8 bits": rows("tokens", lambda t: t % 256),
        "actions in float16": outputs(lambda a, kept: a.half().float()),
        "softmax in bfloat16": ops(attention=with_weights(lambda x:
            x.bfloat16().softmax(-1).float())),
        "mask of -10, after 30 calls": later(30, ops(attention=weighing(lambda x, mask:
            (x - 10.0 * ~mask).softmax(-1)))),
        "first key left out, after 30 calls": later(30, ops(attention_denoise=with_logits(lambda x:
            F.pad(x[..., 1:], (1, 0), value=-1e9)))),
        "logits 0.2% too large, after 30 calls": later(30, ops(attention=with_logits(lambda x: 1.002
            * x))),
        "velocity within 0.7, after 30 calls": steps(lambda a, b, x: b if relative(b, a) < 0.7 else
            None, 30),
        "frames within 0.02, after 50 calls": reused("encode_images", nearer(0.02), after=50),
        "FP8 with e5m2 inputs": fp8_layers(lambda m, f: lambda x: f(x.to(torch.float8_e5m2)
            .to(x.dtype))),
        "FP8 with the scale of row 0": fp8_layers(row_0_scale),
        "FP8 with 4096 times the right scale": fp8_layers(lambda m, f: (m.input_scale.mul_(4096.0),
            f)[1]),
        "FP8 with results in FP8": fp8_layers(lambda m, f: lambda x: f(x).to(torch.float8_e4m3fn)
            .to(x.dtype)),
        "FP8 with the bias twice": fp8_layers(lambda m, f: (lambda x: f(x) + m.bias.to(x.dtype)) if
            m.bias is not None else f),
        "FP8 with sums in bfloat16": fp8_layers(short_sums),
        "FP8 with weights of a scale for half the range": fp8_layers(lambda m, f: (m.weight_fp8
            .copy_((m.weight_fp8.float() * 2).clamp(-448, 448).to(m.weight_fp8.dtype)),
            m.weight_scale.mul_(0.5), f)[2]),
    },
}
# fmt: on
ATTACKS = {name: attack for attacks in KINDS.values() for name, attack in attacks.items()}


def attacked(attack: Attack) -> Callable[[Pi0Policy, Any], runtime.Prepared]:
    """`runtime.apply_knobs` whose policies cheat."""
    honest = runtime.apply_knobs

    def apply(policy: Pi0Policy, cfg: Any) -> runtime.Prepared:
        prepared = honest(policy, cfg)
        call = torch.no_grad()(attack(prepared.policy, prepared.call))
        return runtime.Prepared(prepared.policy, call, call)

    return apply


def config(name: str) -> Config:
    """What an attack runs on: three rows where it is about rows, more calls where it waits."""
    rows = 3 if "row" in name.split() or "row's" in name or name in KINDS["row-0 masks"] else 1
    calls = 60 if name in KINDS["ring"] or "after" in name or "every" in name else 25
    raw = {**RAW, **(ON_FP8 if name.startswith("FP8") else {})}
    flexible = {"layout": "flexible"} if "flexible" in name else {}
    raw |= {"workload": {**RAW["workload"], "batch_size": rows, **flexible}}
    raw |= {"measure": {"warmup": 3, "iterations": calls, "rel_ci": None}}
    return Config.parse(raw).resolved(probe())


def trial(name: str, folder: Path, references: Path) -> dict[str, Any]:
    """The result of a real trial whose policy cheats."""
    path, result = folder / "config.json", folder / "result.json"
    path.write_text(json.dumps(config(name).dump()), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.attacks", "--trial", name, "--config", str(path)]
    command += ["--result", str(result), "--references", str(references)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    document: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return document


def main(argv: Sequence[str] | None = None) -> int:
    """Run the attacks and write a line for each as it comes."""
    if argv is None and sys.argv[1:2] == ["--trial"]:
        del sys.argv[1]
        runtime.apply_knobs = attacked(ATTACKS[sys.argv.pop(1)])
        sys.argv.insert(1, "--in-place")
        runpy.run_module("openpi_opt.trial", run_name="__main__", alter_sys=True)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a JSON line for each result")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--names", nargs="+", choices=ATTACKS, default=list(ATTACKS), metavar="NAME"
    )
    options = parser.parse_args(argv)
    passed = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            for name in [name for name in KINDS[kind] if name in options.names]:
                found = trial(name, Path(folder), Path(folder) / "references")
                line = {"kind": kind, "name": name, "outcome": found["outcome"],
                        "reason": found.get("reason")}  # fmt: skip
                with options.out.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(line) + "\n")
                if found["outcome"] != "wrong":
                    passed += 1
                    print(f"{kind}: {name} ends as {found['outcome']}", flush=True)
    return 1 if passed else 0


if __name__ == "__main__":
    cli.run(main)
