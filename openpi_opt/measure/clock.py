"""Timing of whole calls: device events with the wall clock beside them, or the wall clock alone.

Each iteration is a separate request, as of a robot that waits for its action: the device is idle
when it starts and is waited for when it ends. Its observation is copied to the device right before
it, into memory that no call has read yet, and the copy is timed by itself. A `Feed` makes the
copies, may change them and looks at the results, all outside of what is timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from openpi_opt.config import MIN_ITERATIONS, MIN_WARMUP
from openpi_opt.machine import Device
from openpi_opt.measure.stats import Clock
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.vendor import BY_DEVICE

T = TypeVar("T")
R = TypeVar("R", contravariant=True)


class Feed(Protocol[T, R]):
    """Where timed calls get their inputs, and who gets what they return."""

    def upload(self) -> T:
        """The next inputs, in fresh memory of the device; on a GPU this is timed by itself."""

    def renew(self, inputs: T) -> None:
        """Change the content of the inputs in place, before the call's clocks start."""

    def keep(self, inputs: T, output: R) -> None:
        """Look at a call, after its time was taken."""


@dataclass(frozen=True)
class Timing:
    """Latency of each iteration in milliseconds, in the order in which they ran.

    `clock` says what `samples_ms` were read from. On a CPU both lists are the same readings.
    `upload_samples_ms` is the wall time of the copy before each call, empty on a CPU. `seconds` is
    what all iterations took together, copies and waiting included.
    """

    samples_ms: list[float]
    wall_samples_ms: list[float]
    clock: Clock
    upload_samples_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def without(self, places: Collection[int]) -> Timing:
        """The same without some of its iterations; `seconds` still counts them."""

        def kept(samples: list[float]) -> list[float]:
            return [each for place, each in enumerate(samples) if place not in places]

        return replace(
            self,
            samples_ms=kept(self.samples_ms),
            wall_samples_ms=kept(self.wall_samples_ms),
            upload_samples_ms=kept(self.upload_samples_ms),
        )


def upload(observation: Inputs, device: torch.device) -> Inputs:
    """A copy of a host's observation in fresh memory of `device`, the way `load_policy` does it."""
    return Inputs(*(tensor.to(device, copy=True) for tensor in observation))


def time_calls(
    call: Callable[[T], R], feed: Feed[T, R], warmup: int, iterations: int, device: Device
) -> Timing:
    """Time `iterations` calls after `warmup` untimed ones, all with inputs of `feed`.

    Inputs are made and waited for before the call's clocks start. The garbage collector is off in
    between. What the call returns, and its inputs, are freed after its time was taken.

    Raises ValueError: fewer calls than `MIN_WARMUP` or `MIN_ITERATIONS`.
    """
    if iterations < MIN_ITERATIONS:
        raise ValueError(f"iterations={iterations}: at least {MIN_ITERATIONS} are needed")

    def untimed(_: None) -> None:
        inputs = feed.upload()
        feed.renew(inputs)
        call(inputs)

    warm_up(untimed, [None], warmup, device)
    accelerator = BY_DEVICE[device].accelerator()
    begin = _time_on_cpu if accelerator is None else partial(_time_on_gpu, accelerator)
    with _no_garbage_collection():
        start_ns = time.monotonic_ns()
        timing = begin(call, feed, iterations)
        return replace(timing, seconds=(time.monotonic_ns() - start_ns) / 1e9)


def warm_up(
    call: Callable[[T], object], inputs: Sequence[T], count: int, device: Device
) -> list[float]:
    """Run `count` calls, each to its end, and return their wall times in milliseconds.

    The first ones compile, tune and fill caches: these times say what starting costs and are
    never part of a latency.

    Raises ValueError: no inputs, or `count` under `MIN_WARMUP`.
    """
    if count < MIN_WARMUP:
        raise ValueError(f"warmup={count}: at least {MIN_WARMUP} calls are needed")
    if not inputs:
        raise ValueError("inputs is empty: at least one is needed")
    times_ms = []
    for i in range(count):
        start_ns = time.perf_counter_ns()
        call(inputs[i % len(inputs)])
        synchronise(device)
        times_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
    return times_ms


def synchronise(device: Device) -> None:
    """Wait until the current GPU has finished; on a CPU there is nothing to wait for."""
    if (accelerator := BY_DEVICE[device].accelerator()) is not None:
        accelerator.synchronize()


def _time_on_cpu(call: Callable[[T], R], feed: Feed[T, R], iterations: int) -> Timing:
    elapsed_ns = [0] * iterations
    for i in range(iterations):
        inputs = feed.upload()
        feed.renew(inputs)
        start_ns = time.perf_counter_ns()
        actions = call(inputs)
        elapsed_ns[i] = time.perf_counter_ns() - start_ns
        feed.keep(inputs, actions)
        del actions, inputs  # only now: freeing a tensor takes time that is not the call's
    samples_ms = [value / 1e6 for value in elapsed_ns]
    return Timing(samples_ms, list(samples_ms), "wall")


def _time_on_gpu(
    accelerator: Any, call: Callable[[T], R], feed: Feed[T, R], iterations: int
) -> Timing:
    starts = _ready_events(accelerator, iterations)
    ends = _ready_events(accelerator, iterations)
    wall_ns = [0] * iterations
    upload_ns = [0] * iterations
    for i in range(iterations):
        accelerator.synchronize()
        start_ns = time.perf_counter_ns()
        inputs = feed.upload()
        accelerator.synchronize()
        upload_ns[i] = time.perf_counter_ns() - start_ns
        feed.renew(inputs)
        accelerator.synchronize()
        start_ns = time.perf_counter_ns()
        starts[i].record()
        actions = call(inputs)
        ends[i].record()
        accelerator.synchronize()
        wall_ns[i] = time.perf_counter_ns() - start_ns
        feed.keep(inputs, actions)
        del actions, inputs
    samples_ms = [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]
    wall_ms, upload_ms = ([value / 1e6 for value in each] for each in (wall_ns, upload_ns))
    return Timing(samples_ms, wall_ms, "device_events", upload_ms)


def _ready_events(accelerator: Any, count: int) -> list[Any]:
    """Timing events that exist on the device: torch creates them at the first `record`."""
    events = [accelerator.Event(enable_timing=True) for _ in range(count)]
    for event in events:
        event.record()
    accelerator.synchronize()
    return events


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect once, then keep the collector off; it is restored to what it was."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
