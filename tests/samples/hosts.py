"""A host with a store, and sweeps of stubs on it in processes of their own."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna

from openpi_opt.paths import package_dir
from openpi_opt.process import locks
from openpi_opt.process.devices import LEASES_VARIABLE
from openpi_opt.process.environment import TRIAL_VARIABLE
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.optuna_copy import OptunaCopy
from openpi_opt.track.store import Store


def optuna_study(store: Path, name: str) -> optuna.Study:
    """The copy of a study with one space, made now."""
    study_dir = store / "studies" / name
    OptunaCopy(Store(store), study_dir).update(Journal.read(study_dir).records())
    url = f"sqlite:///{store}/optuna.db"
    (found,) = optuna.get_all_study_names(url)
    return optuna.load_study(study_name=found, storage=url)


class Host:
    """A store, and sweeps of stubs on it in processes of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.store = folder / "store"
        self.starts = folder / "starts.txt"
        self.leases = folder / "leases"
        self.env = os.environ | {
            "PYTHONPATH": str(package_dir().parent),
            LEASES_VARIABLE: str(self.leases),
        }
        self.env.pop("MLFLOW_TRACKING_URI", None)

    def start(self, *words: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "benchmarks.stub_sweep", str(self.store), *words]
        return subprocess.Popen(
            [*argv, "--started", str(self.starts), "--slots", "1"],
            cwd=package_dir().parent,
            env=self.env,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str) -> str:
        process = self.start(*words)
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        return err

    @property
    def study(self) -> Path:
        return self.store / "studies" / "stub"

    @property
    def records(self) -> list[Record]:
        return Journal.read(self.study).records()

    def seeds(self) -> list[int]:
        return [record.result.config["weights"]["seed"] for record in self.records]

    def started(self) -> list[int]:
        return [int(line) for line in self.starts.read_text().split()]

    def processes(self) -> list[int]:
        """Trials of this store that live, on any node; found by the mark, whatever they became.

        Where their compilers keep things is in the store.
        """
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    environ = (entry / "environ").read_bytes().decode(errors="replace")
                    if TRIAL_VARIABLE in environ and f"{self.store}/" in environ:
                        found.append(int(entry.name))
        return found

    def assert_tidy(self) -> None:
        wait_for(lambda: not self.processes())
        leases = list(self.leases.iterdir()) if self.leases.exists() else []
        assert not [path for path in leases if locks.is_held(path)]
        assert not list((self.study / "claims").iterdir())
        assert not list((self.study / "controllers").glob("*-*"))
        assert not list((self.study / "trials").glob("*/alive.lock"))


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
