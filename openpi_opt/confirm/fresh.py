"""Fresh processes outside of a sweep: for promotions, ladders, ablations and pairs.

Each process has a place (what it is for, and its number there). Its record's uid is made from the
place, the configuration and the fingerprint. So after an interruption the journal answers for
every process that had finished, and only the missing ones run. All of them run on one device,
leased as a sweep leases it. What a killed session left running is ended before the next begins.
The next processes prepare while one measures (`process.schedule`).
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import count, islice, pairwise
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import Any

from filelock import FileLock, Timeout

from openpi_opt.config import Config, Tracking
from openpi_opt.errors import UserError
from openpi_opt.machine import Machine
from openpi_opt.process.child import Place, StoppedError, end_marked
from openpi_opt.process.devices import Lease, prepared, reserve
from openpi_opt.process.run import Run, cannot_run, noted, refused, run_trial, whole_result
from openpi_opt.process.schedule import DeviceLostError, Room, Schedule, Turn
from openpi_opt.result import Ok, TrialResult
from openpi_opt.track import identity
from openpi_opt.track.copies import Copies
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.store import Store

# A throttled process is discarded and repeated, this many times at most. The pause doubles.
MAX_THROTTLED = 3
COOLING_S = 15.0
# What a process is taken to need until one has been seen.
_UNKNOWN_S = 60.0
# Processes that prepare at a time, whatever the device has room for. What is measured next depends
# on what was found, so some of them may turn out to be in vain.
_MOST_PREPARED = 5
# Phases in which a process has the device for itself, and those of them that a confirmation has.
_ALONE = ("warmup", "guard", "measure", "profile", "energy", "ceilings")
_JUDGED = _ALONE[:3]


@dataclass(frozen=True)
class Planned:
    """A process that is to run: its configuration, its name on the screen, and its place.

    `key` and `number` are what `rounds.Measure` was asked for. With `retry` it runs again if it was
    not ok in an earlier session; else that is final. It runs again in any case if files of this
    package have changed since.
    """

    config: Config
    shown: str
    place: tuple[str | int, ...]
    retry: bool = False
    key: str = ""
    number: int = 0


class FreshRuns:
    """Runs a configuration in a fresh process, unless the journal has that very process."""

    def __init__(
        self,
        store: Store,
        journal: Journal,
        tracking: Tracking | None,
        machine: Machine,
        say: Callable[[str], None],
        run: Run = run_trial,
        pause: Callable[[float], None] | None = None,
    ):
        self.journal, self.study_dir = journal, journal.study_dir
        self.machine, self._tracking = machine, tracking
        self._store, self._say, self._run, self._pause = store, say, run, pause
        self._lease: Lease | None = None
        self._fingerprint: dict[str, Any] | None = None
        self._new: set[str] = set()  # processes of this session

    def in_turn(
        self, planned: Iterable[Planned]
    ) -> Generator[tuple[Planned, TrialResult], None, None]:
        """All `planned` with their results, in order; the next prepare while one measures.

        A process that the journal has does not run again. `planned` is asked for the next one
        whenever there is room for another process. Only within `alone`. Raises UserError: the GPU
        stays throttled, or the store cannot be written.
        """
        assert self._lease is not None, "measure only within `alone`"
        stop, slot = Event(), self._lease.slot
        schedule = Schedule(stop, Room.of(slot, self.machine.memory_mib), in_order=True)
        begun: deque[tuple[Planned, str, TrialResult | Future[TrialResult]]] = deque()
        most, left = min(_MOST_PREPARED, prepared(slot)), iter(planned)
        with ThreadPoolExecutor(_MOST_PREPARED, thread_name_prefix="process") as threads:
            try:
                while True:
                    for each in islice(left, most - len(begun)):
                        uid, known = self._known(each)
                        if known is None:
                            self._new.add(uid)
                            job = threads.submit(self._job, each, uid, schedule.join(), stop)
                        begun.append((each, uid, known or job))
                    if not begun:
                        return
                    each, uid, answer = begun.popleft()
                    if isinstance(answer, Future):
                        yield each, self._kept(each, uid, answer.result())
                    else:
                        self._say(f"  {each.shown}: {_summary(answer)} (known)")
                        yield each, answer
            finally:
                stop.set()

    def _known(self, each: Planned) -> tuple[str, TrialResult | None]:
        """The identity of a process on this GPU, and its result if it need not run.

        The identity is of 32 hexadecimal digits; a further attempt has another one.
        """
        cfg, gpu = each.config, self.fingerprint(each.config)["gpu"]
        parts = [cfg.hash(), self.fingerprint_hash(cfg)]
        if gpu is not None:  # processes of another GPU do not count, even of the same model
            parts.append(gpu["uuid"])
        for attempt in count():
            place = [*map(str, [*each.place, each.number])]
            place += [f"attempt {attempt}"] if attempt else []
            uid = hashlib.sha256("\n".join([*place, *parts]).encode()).hexdigest()[:32]
            record = self.journal.by_uid(uid)
            if record is None:
                break
            final = isinstance(record.result, Ok) or not each.retry
            if uid in self._new or (final and not identity.changes(record.result)):
                return uid, record.result
        return uid, None

    def fingerprint(self, cfg: Config) -> dict[str, Any]:
        """Machine and software that run `cfg`: after `alone` with the GPU that it took."""
        if self._fingerprint is not None:
            return self._fingerprint
        platform, gpu = cfg.platform, self._lease and self._lease.slot.gpu
        if gpu is not None:
            index = self.machine.gpus_for(cfg.device).index(gpu)
            platform = platform.model_copy(update={"gpu": index})
        found = fingerprint(self.machine, platform)
        if self._lease is not None:
            self._fingerprint = found
        return found

    def fingerprint_hash(self, cfg: Config) -> str:
        """Its hash."""
        return fingerprint_hash(self.fingerprint(cfg))

    def seconds(self, cfg: Config) -> float:
        """What a process of `cfg` adds to a session, by the journal; 60 when it knows none.

        Its work with the device for itself is that of its last processes. The processes that
        prepare together share the rest: the mean over the last ones of any configuration.
        """
        ok = [record for record in self.journal.records() if isinstance(record.result, Ok)]
        if not ok:
            return _UNKNOWN_S
        mine = [each for each in ok if each.result.config_hash == cfg.hash()][-3:] or ok[-3:]
        confirming = [each for each in ok if each.role == "confirm"]
        rest = [_beside_s(each) for each in confirming[:1] or mine]
        rest += [_beside_s(each, _ended(before)) for before, each in pairwise(confirming)]
        # A session that was killed or asleep took longer than its processes.
        rest = [min(max(0.0, each), _UNKNOWN_S) for each in rest[-2 * _MOST_PREPARED :]]
        return fmean(_seconds(each, _JUDGED) for each in mine) + fmean(rest)

    @contextmanager
    def alone(self, cfg: Config, wanted: int | str | None = None) -> Iterator[None]:
        """Keep others away from this study, and from the device that all processes run on.

        The device is one that can run `cfg`, or the GPU that is `wanted`; waits until it is free.
        Raises UserError: another promote, ladder or ablate runs on this study, or no such GPU.
        """
        lock = FileLock(self.study_dir / "confirm.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"study {self.study_dir.name}: another promote, ladder or ablate is running on it."
                "\nThey would disturb each other. Wait for that one to end."
            ) from None
        with ExitStack() as last, ExitStack() as left:
            left.callback(lock.release)
            self._end_orphans()
            if self._tracking is not None:
                about = self._store, self.study_dir, self._tracking, self._say
                copies = Copies(*about, optuna=False)
                last.callback(lambda: copies.close(len(self.journal)))
            records, pause = self.journal.records(), self._pause or time.sleep
            self._lease = reserve(cfg, self.machine, wanted, records, self._say, pause)
            left.callback(self._lease.release)
            self.fingerprint(cfg)
            if self._lease.slot.gpu is not None:
                self._say(f"on {self._lease.slot.name} ({self._lease.slot.gpu.uuid})")
            yield

    def _end_orphans(self) -> None:
        """End what a killed session left; it may hold the device that is to be leased."""
        for folder in sorted((self.study_dir / "confirm").glob("*/")):
            if self.journal.by_uid(folder.name) is None and (ended := end_marked(folder.name)):
                self._say(f"ended {ended} process(es) that a killed session left")

    def _job(self, each: Planned, uid: str, turn: Turn, stop: Event) -> TrialResult:
        """One process, in a thread: refused, found on disk, or run when the device is free."""
        folder = self.study_dir / "confirm" / uid
        with turn:
            try:
                known = refused(each.config, self.machine) or _left(folder, each.config)
                return known or self._unthrottled(each, folder, turn, stop)
            except OSError as error:
                raise cannot_run(folder, error) from error
            except DeviceLostError as error:
                raise UserError(
                    f"{each.shown}: {error}.\nWhat is finished is kept: the same command continues "
                    "when that process is gone."
                ) from error

    def _unthrottled(self, each: Planned, folder: Path, turn: Turn, stop: Event) -> TrialResult:
        # Without what follows the latency and costs seconds: profile, trace and energy.
        off = dict.fromkeys(("kernels", "trace", "energy"), False)
        profile = each.config.profile.model_copy(update=off)
        cfg = each.config.model_copy(update={"profile": profile})

        def start(turn: Turn) -> TrialResult:
            assert self._lease is not None
            caches = self._store.caches / self.fingerprint_hash(cfg)
            place = Place(self._lease.slot, folder.name, caches, self._lease.fds, stop, turn)
            references, machine = self._store.references, self.machine
            return self._run(cfg, folder, references, lambda phase: None, machine, place)

        for attempt in range(MAX_THROTTLED + 1):
            result = turn.run(cfg, start)
            if not throttled(result):
                return result
            if attempt < MAX_THROTTLED:
                wait = COOLING_S * 2**attempt
                self._say(f"  {each.shown}: throttled, discarded; again in {wait:.0f} s")
                if (self._pause or stop.wait)(wait):
                    raise StoppedError("ended while it paused")
        raise UserError(
            f"{each.shown}: the GPU's clock was throttled in {MAX_THROTTLED + 1} processes in a "
            "row, so no latency would hold.\nCool it or raise its power limit. What is finished is "
            "kept: the same command continues."
        )

    def _kept(self, each: Planned, uid: str, result: TrialResult) -> TrialResult:
        """A new result, kept in the journal and said."""
        cfg, folder = each.config, self.study_dir / "confirm" / uid
        record = Record(
            uid=uid,
            study=self.study_dir.name,
            role="confirm",
            shown=each.shown,
            labels=cfg.labels(),
            result=result.model_copy(update={"fingerprint": self.fingerprint(cfg)}),
            trial_dir=f"confirm/{uid}" if folder.exists() else None,
            fingerprint_hash=self.fingerprint_hash(cfg),
        )
        kept = self.journal.append(record).result
        self._say(f"  {each.shown}: {_summary(kept)}")
        return kept


def _left(folder: Path, cfg: Config) -> TrialResult | None:
    """A result that is whole on disk: its session was killed before it could record it."""
    found = whole_result(folder, cfg)
    if found is None or throttled(found):
        return None
    why = "taken from disk: the session that ran it was killed before it was recorded"
    return noted(found, why)


def throttled(result: TrialResult) -> bool:
    """Whether the SM clock was under 75% of its peak, nvbench's rule to discard a sample.

    Read from the check `gpu_clock` of results that have checks.
    """
    checks = getattr(result, "checks", ())
    return any((check.name, check.status) == ("gpu_clock", "flag") for check in checks)


def _summary(result: TrialResult) -> str:
    if isinstance(result, Ok):
        return f"{result.latency.mean_ms:.3f} ms"
    return f"{result.outcome}: {result.reason.splitlines()[0] if result.reason else ''}"


def _seconds(record: Record, phases: Iterable[str]) -> float:
    """Seconds that a process spent in these phases."""
    return sum(record.result.phase_seconds.get(phase, 0.0) for phase in phases)


def _beside_s(record: Record, free: datetime | None = None) -> float:
    """What a process took apart from `_ALONE`, counted from when the device was free."""
    began = datetime.fromisoformat(record.result.started_at)
    took = _ended(record) - (began if free is None else max(began, free))
    return took.total_seconds() - _seconds(record, _ALONE)


def _ended(record: Record) -> datetime:
    return datetime.fromisoformat(record.created_at.replace("Z", "+00:00"))
