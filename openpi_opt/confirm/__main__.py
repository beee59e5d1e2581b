"""Show the error rates of promotion: `python -m openpi_opt.confirm --simulate`.

The simulator draws sweeps and promotes them with the code that `promote` uses. It ends with 0 when
the promise is kept, else with 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy  # its `stats` takes a second to load, so when it is used: --help does not
from numpy.typing import NDArray

from openpi_opt import cli
from openpi_opt.confirm import promise, simulate
from openpi_opt.confirm.promotion import Wanted

MAX_FALSE = 0.01
DEFAULT_TAU = 0.003
# Recorded noise is scaled down to this: with more, a gain of 1% takes thousands of processes.
MAX_TAU = 0.01
# Where all are faster by far more than the noise, for the ties among them.
MOST_FASTER = 0.9


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate and print rates with exact 95% intervals; 0 when the promise is kept, else 1.

    Raises:
        UserError: samples that cannot be read.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not arguments.simulate:
        parser.error("say --simulate; a study is confirmed by `python -m openpi_opt.promote`")
    if arguments.normal:
        tau = arguments.tau or DEFAULT_TAU
        noise, source = simulate.normal(tau), "normal"
    else:
        if arguments.samples:
            found = simulate.residuals(arguments.samples)
            tau = arguments.tau or min(float(np.std(found)), MAX_TAU)
        else:
            found, _ = simulate.shipped()
            tau = arguments.tau or DEFAULT_TAU
        noise, source = simulate.recorded(found, tau), _described(found)
    wanted = Wanted(seed=0, finalists=arguments.finalists)
    count, sweeps, drift = arguments.configurations, arguments.sweeps, arguments.drift
    print(
        f"{sweeps} sweeps of {count} configurations each, spread between processes {tau:.2%} "
        f"({source}), drift {drift:.2%} per process, up to {arguments.finalists} finalists"
    )
    false = simulate.equal(count, sweeps, noise, wanted, drift)
    print(f"all equal: something was promoted in {false}")
    found_rate, overclaimed = simulate.one_faster(
        arguments.gain, count, sweeps, noise, wanted, drift
    )
    print(f"one {arguments.gain:.1%} faster: it was promoted in {found_rate}")
    print(f"  more gain was claimed than there is in {overclaimed}")
    obvious = min(10 * arguments.gain, MOST_FASTER)
    passed_over = simulate.all_faster(obvious, count, sweeps, noise, wanted, drift)
    print(
        f"all {obvious:.0%} faster, equal among themselves: the tie went to one "
        f"farther from the baseline in {passed_over}"
    )
    kept = false.value <= MAX_FALSE and found_rate.value >= promise.PROBABILITY
    print(
        f"promise (at most {MAX_FALSE:.0%}, at least {promise.PROBABILITY:.0%}): "
        + ("kept" if kept else "NOT kept")
    )
    return 0 if kept else 1


def _described(residuals: NDArray[np.float64]) -> str:
    return (
        f"distributed as {len(residuals)} recorded processes: skewness "
        f"{scipy.stats.skew(residuals):+.1f}, excess kurtosis "
        f"{scipy.stats.kurtosis(residuals):+.1f}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m openpi_opt.confirm",
        description="Simulate sweeps and promote them with the code that promotes for real: how "
        "often is something promoted that is not faster, how often is what is faster found?",
    )
    parser.add_argument("--simulate", action="store_true", help="do so")
    parser.add_argument(
        "--tau",
        type=_positive_share,
        help="spread between fresh processes, relative, as 0.003 or 0.3%% (default: 0.3%%; with "
        "--samples theirs, at most 1%%)",
    )
    noise = parser.add_mutually_exclusive_group()
    noise.add_argument(
        "--samples",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="draw the noise from these recorded processes: result.json, journal.jsonl or "
        "pairs.json files (default: processes that come with the project)",
    )
    noise.add_argument("--normal", action="store_true", help="draw normal noise instead")
    parser.add_argument(
        "--gain",
        type=_positive_share,
        default=promise.GAIN,
        help="gain of the faster one (default: 1%%)",
    )
    parser.add_argument(
        "--drift", type=_share, default=0.0, help="random walk per process (default: 0)"
    )
    parser.add_argument(
        "--configurations",
        type=cli.at_least(1),
        default=60,
        help="of a sweep (default: %(default)s)",
    )
    parser.add_argument(
        "--sweeps", type=cli.at_least(1), default=500, help="of each kind (default: %(default)s)"
    )
    parser.add_argument(
        "--finalists",
        type=int,
        choices=range(1, promise.MAX_FINALISTS + 1),
        default=promise.MAX_FINALISTS,
        help="default: %(default)s",
    )
    return parser


def _share(text: str) -> float:
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not 0 <= value < 0.5:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 0.5 (50%)")
    return value


def _positive_share(text: str) -> float:
    if not (value := _share(text)):
        raise argparse.ArgumentTypeError(f"{text} is no spread and no gain: give more than 0")
    return value


_share.__name__ = _positive_share.__name__ = "number"


if __name__ == "__main__":
    cli.run(main)
