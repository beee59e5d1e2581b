"""The timed calls' witness, on a function that is cheap: actions from a few of the inputs."""

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from openpi_opt.config import MIN_WARMUP
from openpi_opt.guarding.cases import OTHER_MASKS, TIMED, masked
from openpi_opt.guarding.witness import Witness
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.result import TimedReport

CALLS = 40
OWN, FLOOR = 1e-2, 1e-5  # as of bfloat16


def inputs(seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    return Inputs(
        torch.rand(2, 2, 3, 8, 8, generator=generator) * 2 - 1,
        torch.ones(2, 2, dtype=torch.bool),
        torch.randint(50, (2, 5), generator=generator),
        torch.ones(2, 5, dtype=torch.bool),
        torch.randn(2, 4, generator=generator),
        torch.randn(2, 6, 4, generator=generator),
    )


def right(given: Inputs) -> Tensor:
    seen = (given.images * given.image_mask[..., None, None, None]).sum(1)
    observed = seen.flatten(1)[:, :24].view(2, 6, 4) + given.state[:, None]
    prompt = (given.tokens * given.token_mask).float().mean(1) / 50.0
    return given.noise + 0.4 * observed + prompt[:, None, None]


def watched(
    call: Callable[[Inputs], Tensor], seed: int = 0, others: int = 0, warm: int = 0
) -> TimedReport:
    """What a witness says; `warm` calls are made before the timing, after the one of `begin`."""
    known = [inputs(1000 + i) for i in range(TIMED + others)]
    known[TIMED:] = [masked(item, i, (True, True)) for i, item in enumerate(known[TIMED:])]
    observations, calls = [inputs(i) for i in range(3)], CALLS
    cameras = (True, True)
    witness = Witness(observations, known, torch.device("cpu"), 50, others, cameras, seed)
    witness.begin(call)
    for _ in range(warm):
        call(observations[0])
    timing = witness.time(call, calls, "cpu", compared=True)
    actions, limits = [right(k) for k in known], [OWN] * len(known)
    return witness.verdict(call, actions, limits, OWN, FLOOR, timing.wall_samples_ms)


@pytest.mark.parametrize("seed", range(5))
def test_a_right_call_passes(seed):
    report = watched(right, seed)
    assert report.problem is None
    assert (report.calls, report.compared, report.seed) == (CALLS, TIMED, seed)
    assert 1 <= report.repeated <= 8


def test_every_call_gets_content_that_none_before_it_had():
    seen: list[Inputs] = []

    def call(given: Inputs) -> Tensor:
        seen.append(Inputs(*(tensor.clone() for tensor in given)))
        return right(given)

    watched(call)
    timed = seen[1 : 1 + MIN_WARMUP + CALLS]
    for name in ("images", "tokens", "state", "noise"):
        contents = {getattr(item, name).numpy().tobytes() for item in timed}
        assert len(contents) == len(timed), name
    last = timed[-1]
    assert any(torch.equal(last.noise, inputs(1000 + i).noise) for i in range(TIMED))
    assert float(timed[0].images.min()) >= -1.0
    assert int(timed[0].tokens.max()) < 50


def test_a_policy_that_reads_masks_gets_others_outside_the_statistics():
    seen: list[tuple[Tensor, Tensor]] = []
    known = [inputs(1000 + i) for i in range(TIMED + OTHER_MASKS)]
    known[TIMED:] = [masked(item, i, (True, True)) for i, item in enumerate(known[TIMED:])]

    def call(given: Inputs) -> Tensor:
        other = not bool(given.image_mask.all() & given.token_mask.all())
        seen.append((given.image_mask.clone(), given.token_mask.clone()))
        time.sleep(0.05 if other else 0.0)  # its time would show
        return right(given)

    witness = Witness([inputs(0)], known, torch.device("cpu"), 50, OTHER_MASKS, (True, False), 3)
    timing = witness.time(call, 200, "cpu", compared=True)
    assert len(timing.samples_ms) == len(timing.wall_samples_ms) == 200
    assert sum(ms > 50.0 for ms in timing.samples_ms) < 5, "other masks are left out"
    others = [pair for pair in seen[MIN_WARMUP:] if not bool(pair[0].all() & pair[1].all())]
    assert len(seen) == MIN_WARMUP + 200 + 200 // 20
    assert len(others) >= 9, "one of 20, of which one may be drawn as the workload's"
    lengths = torch.stack([tokens.sum(1) for _, tokens in others]).flatten().tolist()
    assert {1, 5} <= set(lengths)
    assert sum(bool(cameras[:, 1].any()) for cameras, _ in others) <= OTHER_MASKS
    report = witness.verdict(call, [right(k) for k in known], [OWN] * len(known), OWN, FLOOR,
                             timing.wall_samples_ms)  # fmt: skip
    assert (report.problem, report.other_masks, report.compared) == (None, 10, TIMED + OTHER_MASKS)
    assert report.masks == "drawn"
    assert report.inputs_mib == sum(t.nbytes for k in known for t in k) / 2**20
    values = 2 * 6 * 4 * 4  # bytes of one call's actions
    copies = 2 * 210 + TIMED + OTHER_MASKS
    outputs = report.held_mib * 2**20 / values - copies
    assert 64 <= outputs <= 64 + TIMED + OTHER_MASKS, "the first 64 results, and the compared ones"


def test_masks_that_stay_the_workloads_while_timed_are_found():
    def call(given: Inputs) -> Tensor:
        given = given._replace(token_mask=torch.ones_like(given.token_mask))
        return right(given)

    assert watched(call).problem is None, "an exact layout is not asked"
    assert "from its reference" in str(watched(call, others=OTHER_MASKS).problem)


def at_call(number: int, wrong: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Tensor]:
    """A call that is wrong once, during the timing."""
    count = 0

    def call(given: Inputs) -> Tensor:
        nonlocal count
        count += 1
        return wrong(right(given)) if count == 1 + MIN_WARMUP + number else right(given)

    return call


@pytest.mark.parametrize("number", [1, 17, CALLS - 1])
@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros_like,
        lambda actions: actions.roll(1, dims=0),
        lambda actions: torch.randn(actions.shape, generator=torch.Generator().manual_seed(7)),
        lambda actions: actions * torch.nan,
    ],
    ids=["zeros", "rows", "noise", "nan"],
)
def test_one_bad_call_among_the_timed_ones_is_found(number, wrong):
    problem = watched(at_call(number, wrong)).problem
    assert problem is not None
    assert "timed call" in problem


def test_one_stale_result_is_found():
    kept: list[Tensor] = []

    def call(given: Inputs) -> Tensor:
        kept.append(right(given))
        return kept[-2].clone() if len(kept) == 20 else kept[-1]

    assert "timed call" in str(watched(call).problem)


def test_a_result_that_is_overwritten_is_no_result():
    buffers = [torch.empty(2, 6, 4) for _ in range(9)]
    count = 0

    def ring(given: Inputs) -> Tensor:
        nonlocal count
        count += 1
        return buffers[count % len(buffers)].copy_(right(given))

    assert "memory" in str(watched(ring).problem) or "overwritten" in str(watched(ring).problem)


def test_another_shape_is_wrong():
    assert "returned [2, 5, 4]" in str(watched(lambda given: right(given)[:, :5]).problem)


def drifting(after: int, by: float, unsteady: float = 0.0) -> Callable[[Inputs], Tensor]:
    """All calls from some number on are off by less than the own tolerance."""
    count = 0

    def call(given: Inputs) -> Tensor:
        nonlocal count
        count += 1
        factor = 1.0 + by * (count > 1 + MIN_WARMUP + after)
        return right(given) * (factor + unsteady * torch.rand(()))

    return call


@pytest.mark.parametrize("warm", [0, 200])
def test_a_policy_that_answers_alike_may_not_change_after_many_calls(warm):
    """Not while a GPU is made warm either, which takes more calls than these."""
    said = str(watched(drifting(30, 1e-3), warm=warm).problem)
    assert "0.100% from what the same content gives" in said


def test_a_policy_that_never_answers_alike_may_differ_by_its_own_tolerance():
    assert watched(drifting(30, 0.0, unsteady=5e-3)).problem is None


def test_a_buffer_that_every_17th_call_returns_is_found():
    buffer, count = torch.empty(2, 6, 4), 0

    def call(given: Inputs) -> Tensor:
        nonlocal count
        count += 1
        return right(given) if count % 17 else buffer.copy_(right(given))

    assert "memory" in str(watched(call).problem)
