"""Who measures what right now, over all sweeps of a study on all hosts that share its folder.

A claim is a lock of a configuration on a kind of machine. Its holder is a sweep and then also the
trial, so a claim ends when neither lives. It is removed only when the journal has the result:
whoever gets it afterwards looks there first.
"""

from __future__ import annotations

import json
from pathlib import Path

from openpi_opt.process import locks
from openpi_opt.process.locks import Held


class Claims:
    """The claims of one study."""

    def __init__(self, study_dir: Path):
        self._folder = study_dir / "claims"
        self._folder.mkdir(parents=True, exist_ok=True)

    def take(self, config_hash: str, machine_hash: str, space: str = "") -> Held | None:
        """Claim a configuration for a point of `space`, or None while somebody else has it."""
        about = json.dumps({"config_hash": config_hash, "space": space})
        return locks.take(self.path(config_hash, machine_hash), about)

    def is_held(self, config_hash: str, machine_hash: str) -> bool:
        """Whether somebody measures it."""
        return locks.is_held(self.path(config_hash, machine_hash))

    def take_free(self) -> list[Held]:
        """Take every claim that a killed sweep left without removing it."""
        found = (locks.take(path) for path in self._folder.glob("*.lock"))
        return [held for held in found if held is not None]

    def live(self, space: str) -> tuple[set[str], bool]:
        """Hashes of what is being measured for `space`, and whether a dead sweep left a claim."""
        found, left = set(), False
        for path in self._folder.glob("*.lock"):
            try:
                about = json.loads(locks.note(path))
            except ValueError:  # taken this moment, or gone
                continue
            if about["space"] != space:
                continue
            if locks.is_held(path):
                found.add(about["config_hash"])
            elif path.exists():  # who has the result removes it first and lets go then
                left = True
        return found, left

    def path(self, config_hash: str, machine_hash: str) -> Path:
        """Where the claim of a configuration on a kind of machine is."""
        return self._folder / f"{config_hash}-{machine_hash}.lock"
