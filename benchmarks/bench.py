"""What the engine and the commands cost, each beside its limit: `make bench`.

    python -m benchmarks.bench [--trials 20] [--finished 10,1000,10000]

The limits are for two cores that nobody else uses; the load at the begin and at the end is printed.
Exit code 1 when a figure is over its limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from benchmarks import engine
from openpi_opt import cli
from openpi_opt.machine import probe
from openpi_opt.paths import package_dir

VERBS = (
    *("ablate", "analyze", "audit", "compare", "confirm", "doctor", "kernels", "ladder"),
    *("promote", "sweep", "track", "trial"),
)
OVERHEAD_MS = 150.0
HELP_SECONDS = 1.0
SWEEP_SECONDS = 30.0
_REPEATS = 5


@dataclass(frozen=True)
class Row:
    """One figure with its limit, in `unit`."""

    what: str
    found: float
    limit: float
    unit: str
    detail: str = ""


def rows(finished: Sequence[int], trials: int) -> Iterator[Row]:
    """Measure one after another."""
    for count in finished:
        found = engine.measure(count, trials)
        yield Row(
            f"overhead per trial, {count:,} finished",
            found["overhead_ms"],
            OVERHEAD_MS,
            "ms",
            f"median {found['overhead_median_ms']:.0f}, most {found['overhead_most_ms']:.0f}; "
            f"opening the study {found['open_seconds']:.1f} s",
        )
    taken = {verb: _help_seconds(verb) for verb in VERBS}
    slowest = max((verb for verb in VERBS if verb != "sweep"), key=lambda verb: taken[verb])
    for verb in ("sweep", slowest):
        detail = "" if verb == "sweep" else f"the slowest of the {len(VERBS) - 1} other verbs"
        yield Row(f"{verb} --help", taken[verb], HELP_SECONDS, "s", detail)
    yield Row(
        "two pi0_mini trials, command to table",
        _sweep_seconds(),
        SWEEP_SECONDS,
        "s",
        "in a fresh store, so with the machine's ceilings and the guard's reference",
    )


def _help_seconds(verb: str) -> float:
    """Median of several; the first one, which may read from a cold disk, is not among them."""
    taken = [_seconds([f"openpi_opt.{verb}", "--help"]) for _ in range(_REPEATS + 1)]
    return statistics.median(taken[1:])


def _sweep_seconds() -> float:
    with tempfile.TemporaryDirectory(prefix="openpi-opt-bench-") as store:
        words = ["attention=eager,sdpa", "model=pi0_mini", "platform=cpu", f"store={store}"]
        return _seconds(["openpi_opt.sweep", "-m", *words])


def _seconds(words: list[str]) -> float:
    """Wall time of `python -m ...`, which has to end well."""
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", *words],
        cwd=package_dir().parent,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.monotonic() - began


def main() -> int:
    """Print the table; 1 when a figure is over its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--finished", default="10,1000,10000")
    own = parser.parse_args()
    machine = probe()
    before = os.getloadavg()[0]
    table = Table("figure", "found", "limit", "", "detail", title="cost beside its limit")
    for column in table.columns[1:3]:
        column.justify = "right"
    over = 0
    for row in rows([int(text) for text in own.finished.split(",")], own.trials):
        good = row.found < row.limit
        over += not good
        digits = 0 if row.unit == "ms" else 2
        table.add_row(
            row.what,
            f"{row.found:.{digits}f} {row.unit}",
            f"{row.limit:g} {row.unit}",
            "ok" if good else "OVER",
            row.detail,
        )
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(
        f"{machine.cpu}, {machine.cores} cores, load {before:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after (1 is this benchmark's own)",
        highlight=False,
    )
    return 1 if over else 0


if __name__ == "__main__":
    cli.run(main)
