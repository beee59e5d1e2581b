"""What a sweep says while it runs: on stderr, so that stdout holds the result alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from openpi_opt.config import Config
from openpi_opt.result import Ok, Pruned
from openpi_opt.track.journal import Record, Role

if TYPE_CHECKING:
    from rich.progress import TaskID

_FEW = 3  # swept keys that a line names whatever their values


class Display:
    """Where the engine reports to; this one says nothing."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is to be given back."""

    def note(self, text: str) -> None:
        """Say one thing."""

    def begin(self, slot: str, title: str) -> None:
        """A trial's process is about to start on a slot."""

    def phase(self, slot: str, name: str) -> None:
        """The trial on that slot began a phase. Called from other threads as well."""

    def stop(self, slot: str) -> None:
        """Nothing runs on that slot any more."""

    def end(self, position: str, label: str, record: Record, known: bool, remark: str = "") -> None:
        """A trial has a result, now or (`known`) from earlier; `remark` stands behind it."""
        self.note(summary(position, label, record, known, remark))


class Lines(Display):
    """One line for each trial at its end: for logs and pipes."""

    def note(self, text: str) -> None:
        """Print it."""
        print(text, file=sys.stderr, flush=True)


class Live(Display):
    """The same lines on a terminal, and under them the running trials with phase and clock."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False, emoji=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            # The display shares the host with what is being measured.
            refresh_per_second=2,
        )
        self._tasks: dict[str, tuple[TaskID, str]] = {}

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Print it above the running trials."""
        self._console.print(text, markup=False)

    def begin(self, slot: str, title: str) -> None:
        """Show the trial."""
        task = self._progress.add_task(f"{title}: start", total=None)
        self._tasks[slot] = task, title

    def phase(self, slot: str, name: str) -> None:
        """Show the phase."""
        if slot in self._tasks:
            task, title = self._tasks[slot]
            self._progress.update(task, description=f"{title}: {name}")

    def stop(self, slot: str) -> None:
        """Take the trial away."""
        if slot in self._tasks:
            self._progress.remove_task(self._tasks.pop(slot)[0])


def summary(position: str, label: str, record: Record, known: bool, remark: str = "") -> str:
    """One line about a finished trial; `remark` is how it stands against the best."""
    result = record.result
    parts = [position, label, result.outcome]
    if isinstance(result, Ok):
        parts.append(f"{result.latency.mean_ms:.3f} ± {result.latency.std_ms:.3f} ms")
        flagged = [check.name for check in result.checks if check.status == "flag"]
        if flagged or result.latency.noisy:
            parts.append(f"(flagged: {', '.join(flagged or ['spread'])})")
    elif isinstance(result, Pruned):
        parts.append(f"above {result.seen_low_ms:.3f} ms")
    else:
        parts.append(f"({result.reason.splitlines()[0]})")
    parts.append(remark)
    parts.append("(known, not run again)" if known else "")
    return " ".join(filter(None, parts))


def label(cfg: Config, role: Role, params: dict[str, str]) -> str:
    """What tells a trial apart on the screen.

    A few swept keys as they are; of many the knobs that differ from the baseline, without those
    that no key sweeps: they are the same in all trials.
    """
    if role == "baseline":
        return "baseline"
    if 0 < len(params) <= _FEW:
        return shown(params)
    plain, own = cfg.baseline().labels(), cfg.canonical().labels()
    heads = {key.split(".")[0] for key in params} or set(own)
    others = {key: text for key, text in params.items() if key.split(".")[0] not in own}
    changed = {k: text for k, text in own.items() if k in heads and text != plain[k]}
    return shown({**others, **changed}) or "defaults"


def shown(params: Mapping[str, str]) -> str:
    """Keys and values as on a command line."""
    return " ".join(f"{key}={text}" for key, text in params.items())
