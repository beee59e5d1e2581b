"""Random kills of sweeps and their trials, and a count of what they cost: `make stress`.

    python -m benchmarks.stress [--kills 300] [--real 10] [--seed 0]

In rounds, each on a fresh store: four sweeps at once, two on each of two studies (one enumerated,
one sampled by TPE), all with MLflow, on four stub GPUs, everything real but the workload. At random
moments one of them or one of their trials is killed in a random way; a killed sweep is started
again with the same command, until both studies are complete. Trials leave children that hide.
In two of three rounds the tracking server of one study hangs, refuses or drips; its records are
delivered at the end, to the store (not with `--no-bad-server`). Then `stress_check` looks from
outside. The last round is of real `pi0_mini` trials on CPU cores. Exit code 1 and the folder kept
when anything is lost, doubled or left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import sabotage
from benchmarks.bad_server import MODES as BAD_MODES
from benchmarks.stress_check import (
    LEASES_VARIABLE,
    Counts,
    Watcher,
    check_copies,
    check_study,
    check_tidy,
    marked,
    said_finished,
)
from openpi_opt import cli
from openpi_opt.paths import package_dir
from openpi_opt.process.watcher import descendants

ROOT = package_dir().parent
GPUS = 4
TORN = 0.04  # of the lines that are written to a journal
EARLY = 0.02  # probability, each time that one could be killed while all of them are starting
PATIENCE_SECONDS = 180.0  # so long without a kill and without a result: the engine hangs
# How a sweep is killed. `late`: it stands still while its trials end, then dies. `orphan`: its
# trial stands still, so that it cannot see the end of its sweep.
SWEEP_KILLS = ("kill", "segv", "term", "int", "int twice", "late", "orphan")
TRIAL_KILLS = ("KILL", "TERM", "SEGV", "INT", "ABRT")
# Exit codes. Before the package has its handlers, and when all is over, a signal ends Python
# itself; -9 is a torn line on the way to its end.
_GENTLE = {"term": {130, -9, -15}, "int": {130, -2, -9}, "int twice": {130, -2, -9}}
_HARD = {"kill": {-9}, "segv": {-11}, "late": {-9}, "orphan": {-9}}


@dataclass
class Figures:
    """What was done to the sweeps. `working`: kills of sweeps that had joined their study."""

    kills: Counter[str] = field(default_factory=Counter)
    working: int = 0
    restarts: int = 0
    rounds: int = 0

    @property
    def sweeps(self) -> int:
        """Kills of sweeps."""
        return sum(count for kind, count in self.kills.items() if kind.startswith("sweep"))


@dataclass
class Sweep:
    """One command that is started again until it ends by itself."""

    study: Path
    argv: list[str]
    env: dict[str, str]
    log: Path
    figures: Figures
    counts: Counts
    process: subprocess.Popen[bytes] | None = None
    done: bool = False
    allowed: set[int] = field(default_factory=set)  # exit codes after what was done to it
    said: int = 0  # bytes of the log when it was started

    def turn(self) -> None:
        """Start it, or look how it ended."""
        if self.done:
            return
        if self.process is None:
            with self.log.open("ab") as log:
                self.said = log.tell()
                self.process = subprocess.Popen(
                    self.argv, cwd=ROOT, env=self.env, stdout=log, stderr=log
                )
            self.allowed = set()
            return
        code = self.process.poll()
        if code is None:
            return
        self.process = None
        if code == 0:
            self.done = True
            return
        if code == -signal.SIGKILL and not self.allowed:  # by itself, in the middle of a line
            self.figures.kills["sweep, half a line written"] += 1
            self.figures.working += 1
        elif code not in self.allowed and not self._never_began(code):
            tail = self.log.read_text(errors="replace")[-3000:]
            self.counts.bad(f"{' '.join(self.argv[1:])} ended with {code}:\n{tail}")
            self.done = True
        elif code == cli.INTERRUPTED:
            text = self.log.read_bytes()[self.said :].decode(errors="replace")
            if "Traceback" in text or "interrupted: " not in text:
                self.counts.bad(f"{' '.join(self.argv[1:])} was interrupted without grace:\n{text}")
                self.done = True
        self.figures.restarts += 1

    def _never_began(self, code: int) -> bool:
        """Whether SIGINT met Python before it had begun to run any program."""
        text = self.log.read_text(errors="replace")
        begin = text.rfind("Could not import runpy module")
        return code == 1 and begin >= 0 and text[begin:].rstrip().endswith("KeyboardInterrupt")

    @property
    def at_work(self) -> bool:
        """Whether it lives and has joined its study."""
        return self.living is not None and self._joined()

    @property
    def living(self) -> subprocess.Popen[bytes] | None:
        """Its process, unless it was killed already."""
        return self.process if self.process is not None and not self.allowed else None

    def kill(self, kind: str, drawn: random.Random, trials: Callable[[], list[int]]) -> None:
        """Kill it as told."""
        process = self.living
        assert process is not None
        self.figures.working += self._joined()
        if kind == "late":
            process.send_signal(signal.SIGSTOP)
            time.sleep(drawn.uniform(0.1, 0.6))
        if kind == "orphan":
            own = {_parent(pid) for pid in trials()} & {p.pid for p in descendants(process.pid)}
            kind = "orphan" if own else "kill"
            for pid in own:  # the watchers of its trials, and what these started
                for each in [pid, *(below.pid for below in descendants(pid))]:
                    _send(each, signal.SIGSTOP)
        gentle = {"segv": signal.SIGSEGV, "term": signal.SIGTERM}
        number = signal.SIGINT if kind in ("int", "int twice") else gentle.get(kind, signal.SIGKILL)
        process.send_signal(number)
        if kind == "int twice":
            time.sleep(drawn.uniform(0.0, 0.1))
            process.send_signal(signal.SIGINT)
        self.allowed = _GENTLE.get(kind) or _HARD[kind]
        self.figures.kills[f"sweep, {kind}"] += 1

    def _joined(self) -> bool:
        assert self.process is not None
        return any((self.study / "controllers").glob(f"*-{self.process.pid}-*.lock"))


@dataclass
class Round:
    """A store, the sweeps on it, and who kills them."""

    folder: Path
    sweeps: list[Sweep]
    said: dict[str, Path]  # by the study's name: what its trials say of themselves
    expected: dict[str, int]  # by the study's name: configurations
    drawn: random.Random
    figures: Figures
    counts: Counts
    pace: float  # seconds between kills, on average
    server: subprocess.Popen[str] | None = None  # that misbehaves

    @property
    def store(self) -> Path:
        """Where the sweeps keep their results."""
        return self.folder / "store"

    @property
    def leases(self) -> Path:
        """The folder of leases, which also marks every process of this round."""
        return self.folder / "leases"

    @property
    def studies(self) -> list[Path]:
        """Folders of the studies."""
        return [self.store / "studies" / name for name in self.expected]

    def run(self, kills: int, share: float) -> None:
        """Kill so often or until all is complete; `share` of the victims are trials."""
        watchers = [Watcher(study, self.counts) for study in self.studies]
        due, victim = self._next(), self._victim(share)
        quiet_since = time.monotonic()
        before = self.figures.kills.total()
        try:
            while not all(sweep.done for sweep in self.sweeps):
                for sweep in self.sweeps:
                    sweep.turn()
                time.sleep(0.02)
                now = time.monotonic()
                if now - quiet_since > PATIENCE_SECONDS:
                    if not any(watcher.look() for watcher in watchers):
                        self.counts.bad(f"no result in {PATIENCE_SECONDS:.0f} s without a kill")
                        return
                    quiet_since = now
                if now >= due and self.figures.kills.total() - before < kills:
                    if not (self._trials() if victim == "trial" else self._may()):
                        due = now + 0.1
                        continue
                    for watcher in watchers:
                        watcher.look()
                    self._strike(victim)
                    due, quiet_since, victim = self._next(), now, self._victim(share)
            if not self.counts.violations:  # else some sweep did not come to its end
                self._look(watchers)
        finally:
            self._clear()

    def _next(self) -> float:
        return time.monotonic() + self.drawn.expovariate(1 / self.pace)

    def _victim(self, share: float) -> str:
        return "trial" if self.drawn.random() < share else "sweep"

    def _may(self) -> bool:
        """Most kills wait until some sweep is past its start, which takes a slow host seconds."""
        if any(sweep.at_work for sweep in self.sweeps):
            return True
        return self.drawn.random() < EARLY and any(sweep.living for sweep in self.sweeps)

    def _strike(self, victim: str) -> None:
        if victim == "trial":
            trials, kind = self._trials(), self.drawn.choice(TRIAL_KILLS)
            if trials and _send(self.drawn.choice(trials), signal.Signals[f"SIG{kind}"]):
                self.figures.kills[f"trial, {kind}"] += 1
            return
        living = [sweep for sweep in self.sweeps if sweep.living]
        at_work = [sweep for sweep in living if sweep.at_work]
        if at_work and self.drawn.random() < 0.7:
            living = at_work
        if living:
            self.drawn.choice(living).kill(self.drawn.choice(SWEEP_KILLS), self.drawn, self._trials)

    def _trials(self) -> list[int]:
        return sorted(pid for pid, uid in marked(self.leases).items() if uid is not None)

    def _look(self, watchers: list[Watcher]) -> None:
        """Check the journals, then the copies, after one more command and a sync."""
        for watcher in watchers:
            watcher.look()
        for study in self.studies:
            said = dict(said_finished(self.said[study.name])) if study.name in self.said else {}
            check_study(study, said, self.expected[study.name], self.counts)
        for process in marked(self.leases):
            self.counts.processes += 1
            self.counts.bad(f"process {process} is left when every sweep has ended")
        before = [(study / "journal.jsonl").read_bytes() for study in self.studies]
        commands = {sweep.study: sweep for sweep in self.sweeps}
        for sweep in commands.values():
            self._quiet(sweep.argv, sweep.env)
        env = self.sweeps[-1].env  # without a tracking server
        self._quiet(
            [sys.executable, "-m", "openpi_opt.track", "sync", "--store", str(self.store)], env
        )
        if before != [(study / "journal.jsonl").read_bytes() for study in self.studies]:
            self.counts.bad("the same command, once more, added to the journal")
        check_copies(self.store, self.studies, self.counts)
        check_tidy(self.store, self.leases, Path(env["TMPDIR"]), self.counts)

    def _quiet(self, argv: Sequence[str], env: dict[str, str] | None = None) -> None:
        """Run a command to its end; it must end well."""
        done = subprocess.run(
            argv,
            cwd=ROOT,
            env=env or self.sweeps[0].env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        if done.returncode != 0:
            self.counts.bad(f"{' '.join(argv[1:])}: {done.returncode}\n{done.stderr[-3000:]}")

    def _clear(self) -> None:
        """End what this round started, whatever became of it."""
        for sweep in self.sweeps:
            if sweep.process is not None:
                sweep.process.kill()
                sweep.process.wait()
        for pid in marked(self.leases):
            _send(pid, signal.SIGKILL)
        if self.server is not None:
            self.server.kill()
            self.server.communicate()


def stub_round(
    folder: Path, seed: int, figures: Figures, counts: Counts, own: argparse.Namespace
) -> Round:
    """Four sweeps of stubs on two studies."""
    drawn = random.Random(seed)
    folder.mkdir()
    lengths = folder / "lengths.json"
    lengths.write_text(json.dumps([round(drawn.uniform(0.1, 1.5), 3) for _ in range(own.seeds)]))
    made = Round(folder, [], {}, {}, drawn, figures, counts, own.pace)
    env = _environment(made)
    for study, sampler in (("enumerated", "grid"), ("sampled", "tpe")):
        made.expected[study] = own.seeds
        made.said[study] = folder / f"{study}-finished.txt"
        argv = [sys.executable, "-m", "benchmarks.stub_sweep", str(made.store)]
        argv += ["--study", study, "--sampler", sampler, "--trials", str(own.seeds)]
        argv += ["--seeds", str(own.seeds if sampler == "grid" else 20 * own.seeds)]
        argv += ["--gpus", str(GPUS), "--lengths", str(lengths)]
        if seed % 2 == 0:  # one measures and the others stand still; in every other round, alone
            argv += ["--prepare", "3", "--imports", "0.2", "--measures", "0.2"]
        argv += ["--escapes"]
        argv += ["--finished", str(made.said[study]), "--torn", str(TORN)]
        argv += ["--mlflow"] if study == "enumerated" else []  # the other is delivered at the end
        argv += ["--sabotage", own.sabotage] if own.sabotage else []
        half = GPUS // 2  # each has its own, or the first would leave none to the second
        devices = [range(half), range(half, GPUS)]
        own_env = env | _bad_server(made, seed, own.bad_server) if study == "enumerated" else env
        made.sweeps += _twice(made, study, argv, own_env, devices)
    return made


def _bad_server(made: Round, seed: int, bad: bool) -> dict[str, str]:
    """In two rounds of three a tracking server that misbehaves, and the variable that names it."""
    if not bad or seed % 3 == 0:
        return {}
    argv = [sys.executable, "-m", "benchmarks.bad_server", BAD_MODES[seed // 2 % 3]]
    made.server = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert made.server.stdout is not None
    return {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{made.server.stdout.readline().strip()}"}


def real_round(
    folder: Path, seed: int, figures: Figures, counts: Counts, own: argparse.Namespace
) -> Round:
    """Two sweeps of pi0_mini on one study."""
    folder.mkdir()
    made = Round(folder, [], {}, {}, random.Random(seed), figures, counts, 3 * own.pace)
    knobs = ["attention=eager,sdpa", "simplify=none,all", "fusion=none,all"]
    made.expected["real"] = 2 ** len(knobs)  # the baseline is one of them
    argv = [sys.executable, "-m", "openpi_opt.sweep", "-m", "study=real", f"store={made.store}"]
    argv += ["model=pi0_mini", "platform=cpu", "devices.cpu_slots=2", "measure.max_seconds=1"]
    argv += ["profile.kernels=false"]
    made.sweeps += _twice(made, "real", [*argv, *knobs], _environment(made))
    return made


def _twice(
    made: Round,
    study: str,
    argv: list[str],
    env: dict[str, str],
    devices: Sequence[Sequence[int]] = ((), ()),
) -> list[Sweep]:
    return [
        Sweep(
            made.store / "studies" / study,
            [*argv, *(f"--devices={device}" for device in devices[number])],
            env,
            made.folder / f"{study}-{number}.log",
            made.figures,
            made.counts,
        )
        for number in range(2)
    ]


def _environment(made: Round) -> dict[str, str]:
    temporary = made.folder / "tmp"
    temporary.mkdir()
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        LEASES_VARIABLE: str(made.leases),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
    }
    env.pop("MLFLOW_TRACKING_URI", None)
    return env


def _send(pid: int, number: signal.Signals) -> bool:
    """Signal a process that was found in /proc; False when it is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def table(figures: Figures, counts: Counts, seconds: float) -> Table:
    """Everything that was counted."""
    made = Table("figure", "count", title="random kills of sweeps and their trials")
    made.columns[1].justify = "right"
    for kind, number in sorted(figures.kills.items()):
        made.add_row(f"killed: {kind}", str(number))
    rows: dict[str, float] = {
        "killed, all": figures.kills.total(),
        "of the sweeps killed, at work already": figures.working,
        "sweeps started again": figures.restarts,
        "stores (each with its own studies)": figures.rounds,
        "results in the journals": counts.results,
        "finished by a trial": counts.finished,
        "of these, taken from disk by a later sweep": counts.adopted,
        "torn lines put aside": counts.torn,
        "finished results lost": counts.lost,
        "results duplicated (journal, Optuna, MLflow)": counts.duplicates,
        "processes left": counts.processes,
        "leases, claims and other locks left held": counts.held,
        "files left (claims, temporary ones)": counts.rubbish,
        "violations, all": len(counts.violations),
        "seconds": round(seconds),
    }
    for name, value in rows.items():
        made.add_row(name, str(value), end_section=name == "killed, all")
    return made


def parser() -> argparse.ArgumentParser:
    """Options."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.stress")
    options.add_argument("--kills", type=int, default=300, help="with a stub workload")
    options.add_argument("--real", type=int, default=10, help="kills beside, with pi0_mini")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--seeds", type=int, default=50, help="configurations of a study")
    options.add_argument("--pace", type=float, default=0.7, help="seconds between kills")
    options.add_argument(
        "--bad-server",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in two of three rounds a tracking server that misbehaves",
    )
    options.add_argument("--sabotage", choices=sabotage.WAYS, help="break the engine first")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Kill until there were enough; 1 when anything was found that must not be."""
    own = parser().parse_args(words)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a script
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the sweeps are to heed it
    console = Console(soft_wrap=True)
    figures, counts = Figures(), Counts()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="openpi-opt-stress-"))
    try:
        while (left := own.kills - figures.kills.total()) > 0 and not counts.violations:
            place = folder / str(figures.rounds)
            made = stub_round(place, own.seed + figures.rounds, figures, counts, own)
            made.run(left, share=0.5)
            figures.rounds += 1
            console.print(f"round {figures.rounds}: {figures.kills.total()} kills so far")
        if own.real and not counts.violations:
            made = real_round(folder / "real", own.seed, figures, counts, own)
            made.run(own.real, share=0.25)
            figures.rounds += 1
    finally:
        if not counts.violations:
            shutil.rmtree(folder)
    console.print(table(figures, counts, time.monotonic() - began))
    for text in counts.violations:
        console.print(f"violation: {text}", markup=False, highlight=False)
    if counts.violations:
        console.print(f"kept for a look: {folder}")
    return 1 if counts.violations else 0


if __name__ == "__main__":
    cli.run(main)
