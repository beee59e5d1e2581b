"""Capture and replay with a fake CUDA: what of `kernels/capture.py` needs no GPU to go wrong."""

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch import Tensor

from openpi_opt.kernels.capture import CapturedCall, CaptureError, nothing_compiled
from openpi_opt.pi0.inputs import Inputs


class FakeGraph:
    """Replays the call that was made while it was captured, into the same output."""

    captured: Callable[[], None]

    def replay(self) -> None:
        self.captured()


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch):
    torch._dynamo.reset()
    for name in ("Stream", "current_stream", "Event", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)


def inputs(value: float = 1.0) -> Inputs:
    return Inputs(*(torch.full((1, 2), value) for _ in Inputs._fields))


def captured(function: Callable[[Inputs], Tensor]) -> CapturedCall:
    """A call whose fake graph recomputes into the static output."""
    call = CapturedCall(function)

    def replay() -> None:
        call.output.copy_(function(call.inputs))

    FakeGraph.captured = staticmethod(replay)  # type: ignore[assignment]
    return call


def test_replay_reads_new_inputs_and_returns_a_copy():
    seen: list[int] = []

    def doubled(given: Inputs) -> Tensor:
        seen.append(id(given.noise))
        return given.noise * 2

    call, mine = captured(doubled), inputs(1.0)
    first, second = call(mine), call(inputs(5.0))
    assert float(first[0, 0]) == 2.0
    assert float(second[0, 0]) == 10.0
    assert float(mine.noise[0, 0]) == 1.0, "the caller's inputs are not the static ones"
    assert len(seen) >= 4, "three warm-ups, and the call that is captured"
    assert len(set(seen)) == 1


def test_other_shapes_or_dtypes_are_refused():
    call = captured(lambda i: i.noise * 2)
    call(inputs())
    with pytest.raises(ValueError, match="noise has shape"):
        call(inputs()._replace(noise=torch.ones(1, 3)))
    with pytest.raises(ValueError, match=r"noise is torch\.float64"):
        call(inputs()._replace(noise=torch.ones(1, 2).double()))


def test_compiling_during_the_capture_is_an_error():
    part = torch.compile(lambda x: x * 2, dynamic=False, backend="eager")
    calls = 0

    def late(i: Inputs) -> Tensor:
        """Takes another shape in the capture than in the warm-up."""
        nonlocal calls
        calls += 1
        return part(i.noise if calls <= 3 else i.noise[:, :1])

    with pytest.raises(CaptureError, match="graph capture failed"):
        captured(late)(inputs())


def test_what_was_compiled_before_may_run_inside():
    part = torch.compile(lambda x: x * 2, dynamic=False, backend="eager")
    part(torch.ones(2))
    with nothing_compiled():
        out = part(torch.ones(2))
    assert out.tolist() == [2.0, 2.0]


def test_a_compilation_that_dynamo_lets_pass_is_noticed():
    with pytest.raises(CaptureError, match="compiled"), nothing_compiled():
        torch._dynamo.utils.counters["stats"]["unique_graphs"] += 1


def test_a_failed_capture_leaves_nothing_to_replay():
    def failing(i: Inputs) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    call = captured(failing)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not permitted"):
            call(inputs())


def test_threads_take_turns_with_the_static_inputs():
    def slow(given: Inputs) -> Tensor:
        time.sleep(0.002)
        return given.state * 2

    call = captured(slow)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: float(call(inputs(float(n)))[0, 0]), range(40)))
    assert answers == [2.0 * n for n in range(40)]
