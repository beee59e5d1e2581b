"""How many iterations a latency needs: decided before the first one that is reported.

Samples that choose when to stop do so when they happen to look calm: with 2% of calls 20% slower,
the interval then holds the truth in 44% of runs (tests/measure/test_planning.py). So other calls
choose: planning times blocks until the 95% intervals of mean and median are as narrow as asked, and
as many new calls, and a margin, are reported. In about 85% of runs without heavy tails the interval
is as narrow as asked, in nearly all others within a tenth of it; the result says so otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from openpi_opt.config import MIN_ITERATIONS, Measure
from openpi_opt.measure.clock import Timing
from openpi_opt.measure.stats import Ended, relative_half_width

# The width of an interval is itself estimated, to about 10% from 150 samples, and planning ends
# when it happens to look narrow. Against that: the larger need of the last two looks, and a margin.
MARGIN = 1.4
_GROWTH = 4  # a block is at least a quarter of what there is: few looks, none of them late
_PLANNING_SHARE = 0.5  # of the time


@dataclass(frozen=True)
class Plan:
    """How many iterations to report, and why not more; `samples_ms` are those that decided."""

    iterations: int
    ended: Ended
    samples_ms: list[float] = field(default_factory=list)


def plan(time_block: Callable[[int], Timing], asked: Measure) -> Plan:
    """Choose the number of iterations; `time_block(n)` times n calls.

    Without `asked.rel_ci` nothing is timed and the number is `asked.iterations`. Otherwise it is
    between that and `asked.max_iterations`, and what the time allows; planning takes half of it at
    most. Where it has no room to plan and to report the least number, that is reported.
    """
    if asked.rel_ci is None:
        return Plan(asked.iterations, "iterations")
    samples: list[float] = []
    needs: list[float] = []
    spent = 0.0
    block = MIN_ITERATIONS
    while True:
        timing = time_block(block)
        samples += timing.samples_ms
        spent += timing.seconds
        count, per_call = len(samples), spent / len(samples)
        if count < asked.iterations:
            if asked.seconds / per_call < 2 * asked.iterations:
                return Plan(asked.iterations, "seconds", samples)
            block = max(MIN_ITERATIONS, asked.iterations - count)
            continue
        width = relative_half_width(np.asarray(samples))
        needs.append(count * (width / asked.rel_ci) ** 2)
        left = (_PLANNING_SHARE * asked.seconds - spent) / per_call
        if needs[-1] <= count or left < MIN_ITERATIONS or count >= asked.max_iterations:
            break
        block = max(MIN_ITERATIONS, min(count // _GROWTH, int(left)))
    wanted = max(asked.iterations, math.ceil(MARGIN * max(needs[-2:])))
    affordable = max(asked.iterations, int((asked.seconds - spent) / per_call))
    iterations = min(wanted, affordable, asked.max_iterations)
    ended: Ended = "interval"
    if iterations < wanted:
        ended = "iterations" if iterations == asked.max_iterations else "seconds"
    return Plan(iterations, ended, samples)
