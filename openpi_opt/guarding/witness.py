"""What watches the timed calls: new content for each, and a comparison of what they returned.

Every timed call gets content that no call before it has seen, drawn on the device by a generator
that is seeded by the call's number (Philox on a GPU), outside the timed region. `TIMED` calls at
random places and the last one have a known reference. Their outputs are held, and compared with it,
with a copy and with the memory of the others. Of all calls a copy of up to `COLUMNS` values is
kept; those that look least like the others, the first and some at random must answer the same when
made again: by float32's tolerance, if the policy answers the same content alike bit for bit. At
last repeated content under the profiler shows a policy that remembers: it does less work.

Letters: B batch, H horizon, A action dim, N calls.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openpi_opt.config import MIN_WARMUP
from openpi_opt.measure import guard
from openpi_opt.measure.clock import upload
from openpi_opt.measure.profile import Work, work
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.result import TimedReport

Call = Callable[[Inputs], Tensor]

COLUMNS = 1024
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

    `known` are the contents with a reference, on the host; `vocabulary` bounds drawn prompts.
    """

    observations: Sequence[Inputs]
    known: Sequence[Inputs]
    device: torch.device
    vocabulary: int
    seed: int = field(default_factory=lambda: random.SystemRandom().getrandbits(32))
    _uploads: int = 0
    _number: int = 0
    _place: int = 0
    _chosen: dict[int, int] = field(default_factory=dict)
    _held: list[_Held] = field(default_factory=list)
    _numbers: list[int | None] = field(default_factory=list)
    _rows: list[Tensor] = field(default_factory=list)
    _noise: list[Tensor] = field(default_factory=list)
    _finite: Tensor | None = None
    _problem: str | None = None

    def begin(self, iterations: int, compared: bool) -> None:
        """Tell how many timed calls come next, after the warm-up, and whether to compare some."""
        self._place = -MIN_WARMUP
        self._chosen = {}
        if compared:
            dice = random.Random(self.seed)
            count = min(len(self.known), iterations)
            places = sorted(dice.sample(range(iterations - 1), count - 1))
            order = dice.sample(range(len(self.known)), count)
            self._chosen = dict(zip([*places, iterations - 1], order, strict=True))

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
            self.draw(inputs, self._number)
            if self._place >= 0:
                self._numbers.append(self._number)
        self._place += 1

    def draw(self, inputs: Inputs, number: int) -> None:
        """The content of call `number`: images, prompt, state and noise; masks are kept."""
        generator = torch.Generator(self.device)
        generator.manual_seed((self.seed * 0x9E3779B97F4A7C15 + number) & _MASK)
        inputs.images.uniform_(-1.0, 1.0, generator=generator)
        inputs.tokens.random_(0, self.vocabulary, generator=generator)
        inputs.state.normal_(generator=generator)
        inputs.noise.normal_(generator=generator)

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
        content = self._chosen.get(self._place - 1)
        if content is not None:
            self._held.append(_Held(content, actions, actions.clone()))

    def verdict(
        self,
        call: Call,
        actions: Sequence[Tensor],
        tolerance: float,
        own_tolerance: float,
        floor: float,
        wall_ms: Sequence[float],
        again: int = 0,
    ) -> TimedReport:
        """Compare what was kept, with the reference's `actions` of the known contents.

        `wall_ms` are the wall times of the compared block. `tolerance` bounds the distance from the
        reference. `own_tolerance` bounds that of a repeated call from itself, `floor` where the
        policy answers the same content alike, bit for bit: then a difference is no rounding. At
        least `again` calls are made once more.
        """
        problem = self._problem or self._kept_whole()
        found = [guard.distance(held.output, actions[held.content]).rel_l2 for held in self._held]
        finite = [rel_l2 for rel_l2 in found if rel_l2 is not None]
        worst = max(finite) if finite and len(finite) == len(found) else None
        if problem is None and worst is not None and worst > tolerance:
            problem = (
                f"a timed call with new content is {worst:.2%} from its reference; admitted are "
                f"{tolerance:.2%}"
            )
        off, repeated = 0.0, 0
        if problem is None:
            made_again = self._again(call, wall_ms, again)
            off, number = max(made_again, default=(0.0, 0))
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
        )

    def overwritten(self) -> str | None:
        """What is wrong if a held output is no longer what it was, or None; ask at any time."""
        if any(not torch.equal(held.output, held.copy) for held in self._held):
            return "the result of a timed call was overwritten by a later call"
        return None

    def _kept_whole(self) -> str | None:
        """What is wrong with the held outputs as memory, or None."""
        if self._finite is not None and not bool(self._finite):
            return "a timed call returned NaN or infinity"
        places = [_storage(held.output) for held in self._held]
        if len(set(places)) < len(places):
            return "two timed calls returned the same memory"
        if (overwritten := self.overwritten()) is not None:
            return overwritten
        if len(self._held) < len(self._chosen):
            return f"{len(self._held)} of {len(self._chosen)} timed calls could be compared"
        return None

    def _again(self, call: Call, wall_ms: Sequence[float], least: int) -> list[tuple[float, int]]:
        """Distances of repeated calls from their first results, each with the content's number."""
        found = []
        for index in self._suspects(wall_ms, least):
            number = self._numbers[index]
            assert number is not None
            now, before = self._made(call, number).double(), self._rows[index].double()
            far = float((now - before).norm() / now.norm().clamp_min(1e-30))
            found.append((float("inf") if math.isnan(far) else far, number))
        return found

    def _made(self, call: Call, number: int) -> Tensor:
        """What `call` makes of a content now."""
        inputs = upload(self.observations[0], self.device)
        self.draw(inputs, number)
        return _thin(call(inputs))

    def _steady(self, call: Call, number: int) -> bool:
        """Whether a content gives the same bits in each of `ROUNDS` calls."""
        rows = [self._made(call, number) for _ in range(ROUNDS)]
        return all(torch.equal(row, rows[0]) for row in rows)

    def _suspects(self, wall_ms: Sequence[float], least: int) -> list[int]:
        """Calls that look least like the others, the first one, and some at random.

        They are at least `least`. The first shows a policy that changes after many calls.
        """
        drawn = [i for i, number in enumerate(self._numbers) if number is not None]
        if not drawn:
            return []
        rows = torch.stack([self._rows[i] for i in drawn]).float()
        noise = torch.stack([self._noise[i] for i in drawn]).float()
        chosen = {drawn[0]} | {
            drawn[index]
            for score, count in _suspicions(rows, noise)
            for index in score.topk(min(count, len(drawn))).indices.tolist()
        }
        first = len(self._rows) - len(wall_ms)
        timed = [i for i in drawn if i >= first]
        chosen |= set(sorted(timed, key=lambda i: wall_ms[i - first])[:FASTEST])
        others = [i for i in drawn if i not in chosen]
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


def _copy(source: Inputs, target: Inputs) -> None:
    for new, old in zip(source, target, strict=True):
        old.copy_(new)
