"""The sweeps that work on a study at the moment: each holds a lock of its own while it lives."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock

from openpi_opt.process import locks
from openpi_opt.process.locks import Held


class Controllers:
    """This sweep among those of a study. Make it with `join`."""

    def __init__(self, folder: Path, name: str, held: Held):
        self._folder = folder
        self.name = name
        self._held = held

    @staticmethod
    def join(study_dir: Path) -> Controllers:
        """Say that this process works on the study, until `leave` or its end."""
        folder = study_dir / "controllers"
        folder.mkdir(parents=True, exist_ok=True)
        host = re.sub(r"[^A-Za-z0-9.-]", "-", platform.node())[:60]
        name = f"{host}-{os.getpid()}-{uuid4().hex[:8]}"
        with FileLock(folder / "settle.lock"):  # or `others` may try the lock before it is taken
            held = locks.take(folder / f"{name}.lock")
        assert held is not None  # nobody else has that name
        return Controllers(folder, name, held)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What only one sweep of the study does at a time: settling, beginning, ending."""
        with FileLock(self._folder / "settle.lock"):
            yield

    def is_alive(self, name: str) -> bool:
        """Whether that sweep still works on the study. Ask under `alone`."""
        return locks.is_held(self._folder / f"{name}.lock")

    def others(self) -> int:
        """How many other sweeps there are; traces of dead ones are removed. Ask under `alone`."""
        count = 0
        for path in self._folder.glob("*-*.lock"):
            if path.name == f"{self.name}.lock":
                continue
            held = locks.take(path)
            if held is None:
                count += 1
            else:
                held.release(remove=True)
        return count

    def leave(self) -> None:
        """This sweep is over."""
        self._held.release(remove=True)
