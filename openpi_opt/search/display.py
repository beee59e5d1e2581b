"""What a sweep says while it runs: on stderr, so that stdout holds the result alone."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from openpi_opt.result import Ok
from openpi_opt.track.journal import Record

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Display(Protocol):
    """Where the engine reports to."""

    def note(self, text: str) -> None:
        """Say one thing."""

    def begin(self, position: str, label: str) -> None:
        """A trial's process is about to start."""

    def phase(self, name: str) -> None:
        """The running trial began a phase."""

    def end(self, position: str, label: str, record: Record, known: bool) -> None:
        """A trial has a result, now or (`known`) from earlier."""


class Silent:
    """Says nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def begin(self, position: str, label: str) -> None:
        """Nothing."""

    def phase(self, name: str) -> None:
        """Nothing."""

    def end(self, position: str, label: str, record: Record, known: bool) -> None:
        """Nothing."""


class Lines:
    """One line for each trial at its end: for logs and pipes."""

    def note(self, text: str) -> None:
        """Print it."""
        print(text, file=sys.stderr, flush=True)

    def begin(self, position: str, label: str) -> None:
        """Nothing: the end says it all."""

    def phase(self, name: str) -> None:
        """Nothing."""

    def end(self, position: str, label: str, record: Record, known: bool) -> None:
        """Print position, label, outcome and what there is to say of it."""
        self.note(summary(position, label, record, known))


class Live:
    """The same lines on a terminal, and under them the running trial with phase and clock."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console: Console = Console(stderr=True, highlight=False, emoji=False)
        self._progress: Progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            # The display shares the host with what is being measured.
            refresh_per_second=2,
        )
        self._task: TaskID | None = None
        self._title = ""

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """Print it above the running trial."""
        self._console.print(text, markup=False)

    def begin(self, position: str, label: str) -> None:
        """Show the trial."""
        self._title = f"{position} {label}"
        self._task = self._progress.add_task(f"{self._title}: start", total=None)

    def phase(self, name: str) -> None:
        """Show the phase."""
        if self._task is not None:
            self._progress.update(self._task, description=f"{self._title}: {name}")

    def end(self, position: str, label: str, record: Record, known: bool) -> None:
        """Replace the running trial by its line."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self.note(summary(position, label, record, known))


def summary(position: str, label: str, record: Record, known: bool) -> str:
    """One line about a finished trial."""
    result = record.result
    parts = [position, label, result.outcome]
    if isinstance(result, Ok):
        parts.append(f"{result.latency.mean_ms:.3f} ± {result.latency.std_ms:.3f} ms")
        flagged = [check.name for check in result.checks if check.status == "flag"]
        if flagged or result.latency.noisy:
            parts.append(f"(flagged: {', '.join(flagged or ['spread'])})")
    else:
        parts.append(f"({result.reason.splitlines()[0]})")
    parts.append("(known, not run again)" if known else "")
    return " ".join(filter(None, parts))
