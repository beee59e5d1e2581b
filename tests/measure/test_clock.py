import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from openpi_opt.config import MIN_ITERATIONS, MIN_WARMUP
from openpi_opt.measure import clock
from openpi_opt.measure.clock import Timing, upload, warm_up
from openpi_opt.pi0.inputs import Inputs


def same(value: object) -> object:
    return value


class Cycle:
    """A feed of observations in turn; `renew` and `keep` say what they were given."""

    def __init__(self, observations: Sequence[Any], upload: Callable[[Any], Any] = same) -> None:
        self.observations = observations
        self.make = upload
        self.count = 0
        self.renewed: list[Any] = []
        self.kept = 0

    def upload(self) -> Any:
        self.count += 1
        return self.make(self.observations[(self.count - 1) % len(self.observations)])

    def renew(self, inputs: Any) -> None:
        self.renewed.append(inputs)

    def keep(self, inputs: Any, output: Any) -> None:
        self.kept += 1


def time_calls(
    call: Callable[[Any], Any],
    observations: Sequence[Any],
    upload: Callable[[Any], Any],
    warmup: int,
    iterations: int,
    device: Any,
) -> Timing:
    return clock.time_calls(call, Cycle(observations, upload), warmup, iterations, device)


class FakeGpu:
    """Stands in for the parts of torch.cuda that timing needs, and logs their use.

    Its device takes 3 ms for each call; an event holds the device's time at its record.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.device_ms = 0.0
        self.created = 0

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def upload(self, value: int) -> int:
        self.log.append(f"upload {value}")
        self.device_ms += 1.0
        return value + 10

    def call(self, value: int) -> int:
        self.log.append(f"call {value}")
        self.device_ms += 3.0
        return value

    def renew(self, value: int) -> None:
        self.log.append(f"renew {value}")
        self.device_ms += 0.5

    def keep(self, value: int, output: int) -> None:
        self.log.append(f"keep {value}")
        self.device_ms += 0.25

    def Event(self, enable_timing: bool) -> "FakeEvent":  # noqa: N802, torch's name
        assert enable_timing
        self.created += 1
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.recorded_ms = -1.0
        self.records = 0

    def record(self) -> None:
        self.records += 1
        self.gpu.log.append("create" if self.records == 1 else "record")
        self.recorded_ms = self.gpu.device_ms

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.recorded_ms - self.recorded_ms


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", fake.Event)
    return fake


@pytest.fixture
def ticks(monkeypatch):
    """A wall clock that reads 0, 1, 3, 6, ... ms: reading n and n + 1 are n + 1 ms apart."""

    def reading() -> Iterator[int]:
        now_ms = 0
        for step in range(1, 10_000):
            yield now_ms * 1_000_000
            now_ms += step

    readings = reading()
    monkeypatch.setattr(clock.time, "perf_counter_ns", lambda: next(readings))


@pytest.mark.usefixtures("ticks")
def test_cpu_samples_are_readings_around_each_call():
    timing = time_calls(lambda _: None, [0], same, warmup=3, iterations=10, device="cpu")

    # Six readings belong to the warm-up; iteration i is between readings 6 + 2i and 7 + 2i.
    assert timing.samples_ms == [7.0 + 2 * i for i in range(10)]
    assert timing.wall_samples_ms == timing.samples_ms
    assert timing.wall_samples_ms is not timing.samples_ms
    assert timing.clock == "wall"


def test_cpu_samples_are_milliseconds_of_real_time():
    timing = time_calls(lambda _: time.sleep(0.002), [0], same, 3, 10, "cpu")
    assert 2.0 <= min(timing.samples_ms) < 200.0  # others may hold a core for a while


def test_iterations_cycle_through_the_inputs():
    seen: list[str] = []
    time_calls(seen.append, ["a", "b", "c"], str.upper, warmup=4, iterations=11, device="cpu")
    assert "".join(seen) == "ABCABCABCABCABC"


@pytest.mark.usefixtures("ticks")
def test_gpu_order_of_copies_synchronisation_and_events(gpu):
    feed = Cycle([0, 1], gpu.upload)
    feed.renew, feed.keep = gpu.renew, gpu.keep  # type: ignore[method-assign]
    timing = clock.time_calls(gpu.call, feed, warmup=3, iterations=10, device="cuda")

    calls = [10 + i % 2 for i in range(13)]
    warm = [
        entry
        for i in calls[:3]
        for entry in (f"upload {i - 10}", f"renew {i}", f"call {i}", "synchronize")
    ]
    assert gpu.log[:12] == warm
    created = ["create"] * 10 + ["synchronize"]
    assert gpu.log[12:-100] == created * 2
    iterations = gpu.log[-100:]
    for i, value in enumerate(calls[3:]):
        assert iterations[10 * i : 10 * i + 10] == [
            "synchronize",
            f"upload {value - 10}",
            "synchronize",
            f"renew {value}",
            "synchronize",
            "record",
            f"call {value}",
            "record",
            "synchronize",
            f"keep {value}",
        ]
    assert gpu.created == 20
    assert (
        timing.samples_ms == [3.0] * 10
    )  # without the copy, which takes the device 1 ms, and more
    # Six readings belong to the warm-up; an iteration reads twice around the copy, then twice
    # around the call.
    assert timing.upload_samples_ms == [7.0 + 4 * i for i in range(10)]
    assert timing.wall_samples_ms == [9.0 + 4 * i for i in range(10)]
    assert timing.clock == "device_events"


def test_each_call_gets_a_copy_of_its_own():
    host = Inputs(*(torch.rand(3) for _ in Inputs._fields))
    before = [tensor.clone() for tensor in host]
    seen: set[int] = set()

    def call(inputs: Inputs) -> None:
        for tensor, original in zip(inputs, before, strict=True):
            assert torch.equal(tensor, original)
            assert all(tensor.data_ptr() != held.data_ptr() for held in host)
            seen.add(id(tensor))
            tensor.zero_()

    cpu = torch.device("cpu")
    time_calls(call, [host], lambda observation: upload(observation, cpu), 3, 10, "cpu")
    assert len(seen) >= len(Inputs._fields)


def test_seconds_are_those_of_copies_and_calls():
    def slow(value: int) -> int:
        time.sleep(0.003)
        return value

    timing = time_calls(lambda _: time.sleep(0.002), [0], slow, 3, 10, "cpu")
    assert timing.seconds >= 0.05
    assert timing.upload_samples_ms == []


class Freed:
    """Notes whether the clock had been read again when it was freed."""

    readings = 0
    at_creation: int
    freed_after: list[int]

    def __init__(self, freed_after: list[int]) -> None:
        self.at_creation = Freed.readings
        self.freed_after = freed_after

    def __del__(self) -> None:
        self.freed_after.append(Freed.readings - self.at_creation)


def test_result_is_freed_outside_the_timed_region(monkeypatch):
    real = time.perf_counter_ns

    def counted() -> int:
        Freed.readings += 1
        return real()

    monkeypatch.setattr(clock.time, "perf_counter_ns", counted)
    freed_after: list[int] = []
    time_calls(lambda _: Freed(freed_after), [0], same, warmup=3, iterations=10, device="cpu")
    assert freed_after[3:] == [1] * 10


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_garbage_collector_is_off_inside_and_restored(enabled, fails):
    states: list[bool] = []

    def call(_: int) -> None:
        states.append(gc.isenabled())
        if fails and len(states) == 8:
            raise RuntimeError("broken call")

    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        if fails:
            with pytest.raises(RuntimeError, match="broken call"):
                time_calls(call, [0], same, warmup=3, iterations=10, device="cpu")
        else:
            time_calls(call, [0], same, warmup=3, iterations=10, device="cpu")
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert not any(states[3:])


@pytest.mark.usefixtures("ticks")
def test_warm_up_returns_its_times():
    assert warm_up(lambda _: None, [0], 4, "cpu") == [1.0, 3.0, 5.0, 7.0]


@pytest.mark.parametrize(
    ("warmup", "iterations", "inputs", "message"),
    [
        (MIN_WARMUP - 1, MIN_ITERATIONS, [0], "warmup=2: at least 3"),
        (MIN_WARMUP, MIN_ITERATIONS - 1, [0], "iterations=9: at least 10"),
    ],
)
def test_refuses_too_few(warmup, iterations, inputs, message):
    calls: list[int] = []
    with pytest.raises(ValueError, match=message):
        time_calls(calls.append, inputs, same, warmup, iterations, "cpu")
    assert not calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_events_and_wall_clock_agree_on_a_gpu():
    matrix = torch.randn(4096, 4096)
    timing = time_calls(
        lambda x: x @ x, [matrix, matrix.clone()], lambda x: x.to("cuda", copy=True), 3, 10, "cuda"
    )
    assert timing.clock == "device_events"
    assert all(value > 0.1 for value in timing.upload_samples_ms)  # 64 MiB at under 640 GB/s
    for sample, wall in zip(timing.samples_ms, timing.wall_samples_ms, strict=True):
        assert 0 < sample <= wall
