"""How busy two sweepers keep four slots with trials of mixed length, side by side in one run.

    python -m benchmarks.compare_sweepers [--trials 40] [--seed 0] [--folder build/compare]

One is this project's engine on four stub GPUs, the other Hydra's own Optuna sweeper with the
joblib launcher, installed into an environment of its own below `--folder`. Both try the same
configurations; a trial sleeps as long as its configuration says, so no slot needs a core. Busy is
the time between begin and end of a trial's work; utilisation is the busy time of all slots, divided
by their number and by the span from the first begin to the last end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from openpi_opt import cli
from openpi_opt.errors import UserError
from openpi_opt.paths import package_dir

SLOTS = 4
# The newest of each, release candidates included.
PACKAGES = (
    "hydra-core==1.4.0rc3",
    "hydra-optuna-sweeper==1.4.0rc3",
    "hydra-joblib-launcher==1.4.0rc3",
)
SHOWN = ("hydra-core", "hydra-optuna-sweeper", "hydra-joblib-launcher", "optuna", "joblib")
_APP = """
import json
import time

import hydra


@hydra.main(version_base=None, config_path=".", config_name="config")
def main(cfg):
    began = time.monotonic()
    with open(cfg.lengths) as file:
        time.sleep(json.load(file)[cfg.trial])
    with open(cfg.times, "a") as file:
        file.write(f"{began} {time.monotonic()}\\n")
    return 10.0 + cfg.trial


if __name__ == "__main__":
    main()
"""
_CONFIG = """
defaults:
  - override hydra/sweeper: optuna
  - override hydra/sweeper/sampler: grid
  - override hydra/launcher: joblib
  - _self_
trial: 0
lengths: ???
times: ???
"""


@dataclass(frozen=True)
class Found:
    """Begin and end of every trial, in seconds of one clock, and the whole command's seconds."""

    spans: list[tuple[float, float]]
    command_seconds: float

    @property
    def span(self) -> float:
        """From the first begin to the last end."""
        return max(end for _, end in self.spans) - min(begin for begin, _ in self.spans)

    @property
    def busy(self) -> float:
        """Of all slots together."""
        return sum(end - begin for begin, end in self.spans)

    @property
    def utilisation(self) -> float:
        """Of the slots, 0 to 1."""
        return self.busy / (SLOTS * self.span)

    @property
    def most_at_once(self) -> int:
        """Trials that ran at the same time; more than slots would be no fair comparison."""
        begins = [begin for begin, _ in self.spans]
        return max(sum(b <= begin < e for b, e in self.spans) for begin in begins)


def lengths(trials: int, seed: int) -> list[float]:
    """Seconds of each trial: most are short, some take many times as long."""
    drawn = random.Random(seed)
    return [round(min(10.0, max(0.5, drawn.lognormvariate(0.7, 0.8))), 2) for _ in range(trials)]


def ours(folder: Path, trials: int) -> Found:
    """This engine."""
    times = folder / "ours.txt"
    argv = [sys.executable, "-m", "benchmarks.stub_sweep", str(folder / "store")]
    argv += ["--gpus", str(SLOTS), "--seeds", str(trials), "--sampler", "grid"]
    argv += ["--lengths", str(folder / "lengths.json"), "--times", str(times)]
    env = os.environ | {"OPENPI_OPT_LEASES": str(folder / "leases")}
    return _found(argv, package_dir().parent, env, times)


def theirs(folder: Path, python: Path, trials: int) -> Found:
    """Hydra's sweeper: it proposes as many at a time as there are slots, and waits for them all."""
    app, times = folder / "app", folder / "theirs.txt"
    app.mkdir()
    (app / "app.py").write_text(_APP)
    (app / "config.yaml").write_text(_CONFIG)
    points = ",".join(map(str, range(trials)))
    argv = [str(python), "app.py", "-m", f"trial=choice({points})", f"times={times}"]
    argv += [f"lengths={folder / 'lengths.json'}", f"hydra.sweeper.n_trials={trials}"]
    argv += [f"hydra.sweeper.n_jobs={SLOTS}", f"hydra.launcher.n_jobs={SLOTS}"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return _found(argv, app, env, times)


def _found(argv: list[str], cwd: Path, env: dict[str, str], times: Path) -> Found:
    began = time.monotonic()
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode != 0:
        raise UserError(f"{' '.join(argv[1:4])} ended with {done.returncode}:\n{done.stderr}")
    lines = [line.split() for line in times.read_text().splitlines()]
    return Found([(float(begin), float(end)) for begin, end in lines], seconds)


def environment(folder: Path) -> tuple[Path, str]:
    """Python with Hydra's sweeper, made when absent, and its versions."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "install", *PACKAGES], capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"cannot install {', '.join(PACKAGES)}:\n{done.stderr}")
    listed = subprocess.run(
        [*pip, "list", "--format=json"], check=True, capture_output=True, text=True
    )
    versions = {item["name"]: item["version"] for item in json.loads(listed.stdout)}
    return python, ", ".join(f"{name} {versions[name]}" for name in SHOWN)


def table(found: dict[str, Found]) -> Table:
    """One line for each sweeper."""
    made = Table("sweeper", "trials", "at once", "span s", "busy s", "slots busy", "command s")
    for column in made.columns[1:]:
        column.justify = "right"
    for name, one in found.items():
        made.add_row(
            name,
            str(len(one.spans)),
            str(one.most_at_once),
            f"{one.span:.1f}",
            f"{one.busy:.1f}",
            f"{one.utilisation:.1%}",
            f"{one.command_seconds:.1f}",
        )
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Print the table; 1 when a trial is missing or more ran at a time than there are slots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare_sweepers")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("build/compare"))
    own = parser.parse_args(words)
    python, versions = environment(own.folder.absolute())
    seconds = lengths(own.trials, own.seed)
    with tempfile.TemporaryDirectory(prefix="openpi-opt-compare-") as text:
        folder = Path(text)
        (folder / "lengths.json").write_text(json.dumps(seconds))
        found = {
            "openpi_opt": ours(folder, own.trials),
            "hydra-optuna": theirs(folder, python, own.trials),
        }
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{own.trials} trials of {min(seconds):.1f} to {max(seconds):.1f} s, {sum(seconds):.1f} s "
        f"in all (seed {own.seed}), {SLOTS} slots; {versions}"
    )
    console.print(table(found))
    fair = all(len(one.spans) == own.trials and one.most_at_once <= SLOTS for one in found.values())
    return 0 if fair else 1


if __name__ == "__main__":
    cli.run(main)
