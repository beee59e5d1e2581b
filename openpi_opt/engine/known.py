"""Which recorded results answer for a configuration today, and why others do not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from openpi_opt.config import Config
from openpi_opt.machine import Machine
from openpi_opt.result import Refused
from openpi_opt.space.points import left_out
from openpi_opt.track import identity
from openpi_opt.track.journal import Record


@dataclass
class Known:
    """Judges records of one kind of machine. With `keep_source` changed files do not matter."""

    machine: Machine
    keep_source: bool = False
    _changes: dict[str, list[str]] = field(default_factory=dict)

    def answers(self, record: Record) -> bool:
        """Whether the record's result is what would be measured today, or is taken for it."""
        return self.keep_source or not self.changes(record)

    def changes(self, record: Record) -> list[str]:
        """What has changed since the result was measured; see `identity.changes`."""
        if record.uid not in self._changes:
            self._changes[record.uid] = self._of(record)
        return self._changes[record.uid]

    def kept(self, records: Iterable[Record]) -> dict[str, str]:
        """What has changed since, by uid, of the records that answer all the same."""
        changed = {record.uid: self.changes(record) for record in records}
        return {uid: identity.summary([names]) for uid, names in changed.items() if names}

    def _of(self, record: Record) -> list[str]:
        result = record.result
        if isinstance(result, Refused) and not result.files:  # no process: ask again, it is cheap
            if left_out(Config.load(result.config), self.machine, allow_lossy=True):
                return []
            return ["what the knobs check"]
        return identity.changes(result)


def measured_again(changes: Iterable[list[str]], sampled: bool) -> str | None:
    """One line that says how many known results are not used, and why; None for none."""
    found = list(changes)
    if not found:
        return None
    plural = "s are" if len(found) > 1 else " is"
    verb = "not used" if sampled else "measured again"
    return (
        f"{len(found)} known result{plural} {verb}: {identity.summary(found)} "
        "(--keep-source answers from them)"
    )
