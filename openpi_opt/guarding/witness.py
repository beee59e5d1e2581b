"""What watches the timed calls: new content for each, and a comparison of what they returned.

Every timed call gets content that no call before it has seen, drawn on the device by a generator
that is seeded by the call's number (Philox on a GPU), outside the timed region. `TIMED` calls at
random places and the last one have a known reference. Their outputs are held, and compared with it,
with a copy and with the memory of the others. Of all calls a copy of up to `COLUMNS` values is
kept; those that look least like the others and some at random must answer the same when made again,
as must a call from before the device was made warm: by float32's tolerance, if the policy answers
the same content alike bit for bit. At last repeated content under the profiler shows a policy that
remembers: it does less work.

A policy that reads masks gets more calls, at random places between the others, with other cameras
and prompt lengths in each row. `OTHER_MASKS` of them have a reference. Their times do not count: a
policy that is faster for a short prompt would look faster than it is with the workload's.

Letters: B batch, C cameras, L prompt slots, H horizon, A action dim, N calls.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openpi_opt.config import MIN_WARMUP
from openpi_opt.machine import Device
from openpi_opt.measure import guard
from openpi_opt.measure.clock import Timing, time_calls, upload
from openpi_opt.measure.profile import Work, work
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.result import TimedReport

Call = Callable[[Inputs], Tensor]

COLUMNS = 1024
SHARE_OTHERS = 20  # one call with other masks for so many with the workload's
# So many of the first results are held, too, if they are not larger together: a buffer that only
# every n-th call returns is one memory in two of them.
RUN, RUN_BYTES = 64, 1 << 20
FASTEST = 2  # calls that are made again because they took the least time
# A policy that remembers: repeated calls launch less than a new one, or keep a GPU busy for less
# than this share of its time, in each of `ROUNDS` rounds.
FASTER, ROUNDS = 0.9, 3
_MASK = (1 << 63) - 1


@dataclass
class _Held:
    """One compared call: the output itself, and what it was when the call ended."""

    content: int
    output: Tensor
    copy: Tensor


@dataclass
class Witness:
    """A `clock.Feed`. `observations` (on the host) are uploaded in turn, then given new content.

    `known` are the contents with a reference, on the host: first those with the workload's masks,
    then `others` with masks of their own, which only a policy gets that reads masks. `cameras` are
    those that it may be asked for, `vocabulary` bounds drawn prompts.
    """

    observations: Sequence[Inputs]
    known: Sequence[Inputs]
    device: torch.device
    vocabulary: int
    others: int = 0
    cameras: tuple[bool, ...] = ()
    seed: int = field(default_factory=lambda: random.SystemRandom().getrandbits(32))
    _uploads: int = 0
    _number: int = 0
    _place: int = 0
    _calls: int = 0
    _chosen: dict[int, int] = field(default_factory=dict)
    _masked: set[int] = field(default_factory=set)
    _drawn_masks: set[int] = field(default_factory=set)
    _held: list[_Held] = field(default_factory=list)
    _numbers: list[int | None] = field(default_factory=list)
    _rows: list[Tensor] = field(default_factory=list)
    _run: list[Tensor] = field(default_factory=list)
    _noise: list[Tensor] = field(default_factory=list)
    _finite: Tensor | None = None
    _problem: str | None = None
    _before: Tensor | None = None

    def begin(self, call: Call) -> None:
        """Keep what an observation gives now, before the device is made warm; see `verdict`."""
        self._before = self._made(call, None)

    def time(self, call: Call, iterations: int, device: Device, compared: bool) -> Timing:
        """Time `iterations` calls after a short warm-up; with `compared`, for `verdict`.

        Then there are more calls, those with other masks, whose times are left out.
        """
        self._place, self._calls = -MIN_WARMUP, iterations
        self._chosen, self._masked = {}, set()
        if compared:
            self._choose(iterations)
        timing = time_calls(call, self, MIN_WARMUP, self._calls, device)
        return timing.without(self._masked)

    def _choose(self, iterations: int) -> None:
        """The places of the calls that get a known content, and of those with other masks."""
        dice, plain = random.Random(self.seed), len(self.known) - self.others
        more = max(self.others, iterations // SHARE_OTHERS) if self.others else 0
        self._calls = iterations + more
        masked = dice.sample(range(self._calls - 1), more)
        own = sorted(set(range(self._calls - 1)) - set(masked))
        count = min(plain, iterations)
        places = [*sorted(dice.sample(own, count - 1)), self._calls - 1, *masked[: self.others]]
        contents = [*dice.sample(range(plain), count), *range(plain, len(self.known))]
        self._chosen = dict(zip(places, contents, strict=True))
        self._masked = set(masked)

    def upload(self) -> Inputs:
        """A copy of a host's observation in fresh memory of the device."""
        self._uploads += 1
        return upload(self.observations[self._uploads % len(self.observations)], self.device)

    def renew(self, inputs: Inputs) -> None:
        """Give `inputs` the content of the next call."""
        content = self._chosen.get(self._place)
        if content is not None:
            _copy(self.known[content], inputs)
            self._numbers.append(None)
        else:
            self._number += 1
            if self._place in self._masked:
                self._drawn_masks.add(self._number)
            self.draw(inputs, self._number)
            if self._place >= 0:
                self._numbers.append(self._number)
        self._place += 1

    def draw(self, inputs: Inputs, number: int) -> None:
        """The content of call `number`: images, prompt, state and noise.

        Masks are kept, or in some calls drawn for each row: any of `cameras`, 1 to L tokens.
        """
        generator = torch.Generator(self.device)
        generator.manual_seed((self.seed * 0x9E3779B97F4A7C15 + number) & _MASK)
        inputs.images.uniform_(-1.0, 1.0, generator=generator)
        inputs.tokens.random_(0, self.vocabulary, generator=generator)
        inputs.state.normal_(generator=generator)
        inputs.noise.normal_(generator=generator)
        if number in self._drawn_masks:
            (batch, slots), device = inputs.token_mask.shape, self.device
            on = torch.rand(inputs.image_mask.shape, generator=generator, device=device) < 0.5
            inputs.image_mask.copy_(on & torch.tensor(self.cameras, device=device))
            length = torch.randint(1, slots + 1, (batch, 1), generator=generator, device=device)
            inputs.token_mask.copy_(torch.arange(slots, device=device) < length)

    def keep(self, inputs: Inputs, actions: Tensor) -> None:
        """Remember what a timed call returned, after its time was taken."""
        if actions.shape != inputs.noise.shape:
            self._problem = f"a timed call returned {list(actions.shape)} actions"
            return
        finite = actions.isfinite().all()
        self._finite = finite if self._finite is None else self._finite & finite
        self._rows.append(_thin(actions))
        self._noise.append(_thin(inputs.noise))
        if _storage(actions) in {_storage(tensor) for tensor in inputs}:
            self._problem = "the actions of a timed call lie in the memory of its inputs"
        if len(self._run) < min(RUN, RUN_BYTES // max(1, actions.nbytes)):
            self._run.append(actions)
        content = self._chosen.get(self._place - 1)
        if content is not None:
            self._held.append(_Held(content, actions, actions.clone()))

    def verdict(
        self,
        call: Call,
        actions: Sequence[Tensor],
        tolerances: Sequence[float],
        own_tolerance: float,
        floor: float,
        wall_ms: Sequence[float],
        again: int = 0,
    ) -> TimedReport:
        """Compare what was kept, with the reference's `actions` of the known contents.

        `tolerances` bound their distances. `own_tolerance` bounds that of a repeated call from
        itself, `floor` where the policy answers the same content alike, bit for bit: then a
        difference is no rounding. `wall_ms` are the wall times of the compared block, as `time`
        returned them. At least `again` calls are made once more, and that of `begin`: a policy that
        changes after many calls may have changed before the first timed one.
        """
        problem = self._problem or self._kept_whole()
        held = [tensor for each in self._held for tensor in (each.output, each.copy)]
        found = [
            (guard.distance(each.output, actions[each.content]).rel_l2, tolerances[each.content])
            for each in self._held
        ]
        finite = [(rel_l2, admitted) for rel_l2, admitted in found if rel_l2 is not None]
        worst, tolerance = max(finite, key=lambda pair: pair[0] / pair[1], default=(None, 0.0))
        if len(finite) < len(found):
            worst = None
        if problem is None and worst is not None and worst > tolerance:
            problem = (
                f"a timed call with new content is {worst:.2%} from its reference; admitted are "
                f"{tolerance:.2%}"
            )
        off, repeated = 0.0, 0
        if problem is None:
            made_again = self._again(call, wall_ms, again)
            off, number = max(made_again, key=lambda pair: pair[0], default=(0.0, None))
            repeated = len(made_again)
            admitted = floor if off > floor and self._steady(call, number) else own_tolerance
            if off > admitted:
                problem = (
                    f"a timed call returned something {off:.3%} from what the same content gives "
                    f"again; admitted are {admitted:.3%}"
                )
        problem = problem or self._remembers(call)
        return TimedReport(
            passed=problem is None,
            calls=len(self._rows),
            compared=len(self._held),
            rel_l2=worst,
            tolerance=tolerance,
            repeated=repeated,
            repeated_rel_l2=off,
            seed=self.seed,
            problem=problem,
            masks="drawn" if self.others else "workload",
            other_masks=len(self._masked),
            held_mib=_mib([*self._rows, *self._noise, *self._run, *held]),
            inputs_mib=_mib(tensor for inputs in self.known for tensor in inputs),
        )

    def overwritten(self) -> str | None:
        """What is wrong if a held output is no longer what it was, or None; ask at any time."""
        kept = [(held.output, held.copy) for held in self._held]
        kept += [(_thin(actions), row) for actions, row in zip(self._run, self._rows, strict=False)]
        if any(not torch.equal(now, before) for now, before in kept):
            return "the result of a timed call was overwritten by a later call"
        return None

    def _kept_whole(self) -> str | None:
        """What is wrong with the held outputs as memory, or None."""
        if self._finite is not None and not bool(self._finite):
            return "a timed call returned NaN or infinity"
        run = {id(actions) for actions in self._run}
        later = [held.output for held in self._held if id(held.output) not in run]
        places = [_storage(actions) for actions in (*self._run, *later)]
        if len(set(places)) < len(places):
            return "two timed calls returned the same memory"
        if (overwritten := self.overwritten()) is not None:
            return overwritten
        if len(self._held) < len(self._chosen):
            return f"{len(self._held)} of {len(self._chosen)} timed calls could be compared"
        return None

    def _again(
        self, call: Call, wall_ms: Sequence[float], least: int
    ) -> list[tuple[float, int | None]]:
        """Distances of repeated calls from their first results, each with the content's number."""
        kept = [(self._numbers[i], self._rows[i]) for i in self._suspects(wall_ms, least)]
        if self._before is not None:
            kept.append((None, self._before))
        found = []
        for number, row in kept:
            now, before = self._made(call, number).double(), row.double()
            far = float((now - before).norm() / now.norm().clamp_min(1e-30))
            found.append((float("inf") if math.isnan(far) else far, number))
        return found

    def _made(self, call: Call, number: int | None) -> Tensor:
        """What `call` makes of a content now; of an observation as it is, where there is none."""
        inputs = upload(self.observations[0], self.device)
        if number is not None:
            self.draw(inputs, number)
        return _thin(call(inputs))

    def _steady(self, call: Call, number: int | None) -> bool:
        """Whether a content gives the same bits in each of `ROUNDS` calls."""
        rows = [self._made(call, number) for _ in range(ROUNDS)]
        return all(torch.equal(row, rows[0]) for row in rows)

    def _suspects(self, wall_ms: Sequence[float], least: int) -> list[int]:
        """Calls that look least like the others, and some at random: at least `least` of them.

        Calls with other masks do look different, so those are chosen at random alone.
        """
        first = len(self._rows) - self._calls
        masked = {first + place for place in self._masked}
        new = [i for i, number in enumerate(self._numbers) if number is not None]
        drawn = [i for i in new if i not in masked]
        if not drawn:
            return []
        rows = torch.stack([self._rows[i] for i in drawn]).float()
        noise = torch.stack([self._noise[i] for i in drawn]).float()
        chosen = {
            drawn[index]
            for score, count in _suspicions(rows, noise)
            for index in score.topk(min(count, len(drawn))).indices.tolist()
        }
        plain = [i for i in range(first, len(self._rows)) if i not in masked]
        took_ms = dict(zip(plain, wall_ms, strict=True))
        chosen |= set(sorted(took_ms.keys() & {*drawn}, key=lambda i: took_ms[i])[:FASTEST])
        others = [i for i in new if i not in chosen]
        more = min(len(others), max(1, least - len(chosen)))
        return sorted([*chosen, *random.Random(self.seed + 1).sample(others, more)])

    def _remembers(self, call: Call) -> str | None:
        """What a policy answers with less work the second time, or None."""
        suspected = list(_WORDS)
        for _ in range(ROUNDS):
            base = self._next()
            new = work(call, base, self.device)
            call(self._repeat(base, "whole"))  # some keep only what they see twice
            found = {k: work(call, self._repeat(base, k), self.device) for k in suspected}
            suspected = [kind for kind, again in found.items() if _less(again, new)]
            if not suspected:
                return None
        again = found[suspected[0]]
        return (
            f"remembers: where {_WORDS[suspected[0]]}, a call takes {again}, and {new} with new "
            "content"
        )

    def _next(self) -> Inputs:
        inputs = upload(self.observations[0], self.device)
        self._number += 1
        self.draw(inputs, self._number)
        return inputs

    def _repeat(self, base: Inputs, kind: str) -> Inputs:
        """Content in fresh memory, of which the part called `kind` is that of `base`."""
        inputs = self._next()
        for name in _PARTS[kind]:
            getattr(inputs, name).copy_(getattr(base, name))
        return inputs


_PARTS = {
    "whole": Inputs._fields,
    "observation": tuple(name for name in Inputs._fields if name != "noise"),
    "frames": ("images",),
    "prompt": ("tokens",),
}
_WORDS = {
    "whole": "all inputs are repeated",
    "observation": "the observation is repeated",
    "frames": "the frames are repeated",
    "prompt": "the prompt is repeated",
}


def _less(again: Work, new: Work) -> bool:
    return again.launches < new.launches or again.busy_ms < FASTER * new.busy_ms


def _suspicions(rows: Tensor, noise: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Scores [N] of outputs [N, D], larger for calls that look less like the others, and how many.

    First how near the nearest other output is. Then how far what the own noise does not explain is
    from its usual size, and the share that it explains from its usual share: both by the median and
    the median deviation, which a few bad calls do not move.
    """
    if len(rows) > 1:
        norms = rows.square().sum(1)
        nearest = torch.full_like(norms, torch.inf)
        for start in range(0, len(rows), COLUMNS):
            part = rows[start : start + COLUMNS]
            gaps = norms[start : start + COLUMNS, None] + norms[None] - 2.0 * part @ rows.T
            index = torch.arange(len(part), device=rows.device)
            gaps[index, index + start] = torch.inf
            nearest[start : start + COLUMNS] = gaps.amin(1)
        yield -nearest, 2  # two are near each other, and one of them may be right
    rows = rows - rows.median(0).values
    noise = noise - noise.mean(0)
    share = (rows * noise).sum(1) / noise.square().sum(1).clamp_min(1e-30)
    middle = share.median()
    rest = (rows - middle * noise).norm(dim=1)
    yield _unusual(rest), 1
    yield _unusual(share), 1


def _unusual(values: Tensor) -> Tensor:
    away = (values - values.median()).abs()
    return away / away.median().clamp_min(1e-30)


def _thin(actions: Tensor) -> Tensor:
    """A copy of at most `COLUMNS` of the values, evenly spread."""
    flat = actions.detach().flatten()
    return flat[:: -(-len(flat) // COLUMNS)].clone()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _mib(tensors: Iterable[Tensor]) -> float:
    """The memory in which tensors lie, each piece once."""
    found = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values()) / 2**20


def _copy(source: Inputs, target: Inputs) -> None:
    for new, old in zip(source, target, strict=True):
        old.copy_(new)
