"""One trial from its claim to its record."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from uuid import uuid4

from openpi_opt.config import Config
from openpi_opt.engine.display import Display
from openpi_opt.engine.executor import Executor, LostError, Task
from openpi_opt.engine.ledger import Ledger
from openpi_opt.errors import UserError
from openpi_opt.knobs import KNOBS
from openpi_opt.machine import Machine
from openpi_opt.process import tools
from openpi_opt.process.devices import Lease
from openpi_opt.process.locks import Held
from openpi_opt.process.run import log_tail
from openpi_opt.result import Failed, Refused, TrialResult
from openpi_opt.space.optimizer import Proposal
from openpi_opt.track import identity
from openpi_opt.track.journal import Record, Role
from openpi_opt.track.store import unusable

_FEW = 3  # swept keys that a line names whatever their values


@dataclass(eq=False)
class Job:
    """A configuration to measure. `proposal` is None for a baseline; `claim` once it is ours."""

    cfg: Config
    role: Role
    position: str
    proposal: Proposal | None = None
    claim: Held | None = None
    uid: str = field(default_factory=lambda: uuid4().hex)
    folder: Path | None = None
    alive: Held | None = None
    lease: Lease | None = None
    config_hash: str = ""
    lost: bool = False

    def __post_init__(self) -> None:
        self.config_hash = self.cfg.hash()  # asked for often

    @property
    def params(self) -> dict[str, str]:
        """The point's values; a baseline has none."""
        return self.proposal.params if self.proposal else {}

    @property
    def title(self) -> str:
        """What tells it apart on the screen."""
        return label(self.cfg, self.role, self.params)

    def begin_again(self) -> None:
        """Be another trial of the same claim: the device and what was started are given up."""
        if self.lease is not None:
            self.lease.release()
        if self.alive is not None:
            self.alive.release(remove=True)
        self.lease = self.folder = self.alive = None
        self.uid, self.lost = uuid4().hex, True

    def let_go(self, done: bool = False) -> None:
        """Release device and claim; `done` when the journal has the result."""
        if self.lease is not None:
            self.lease.release()
        for held in (self.alive, self.claim):
            if held is not None:
                held.release(remove=done)


@dataclass(frozen=True)
class Race:
    """What a trial runs against: the fastest so far, and how many times slower is hopeless.

    A trial prepares for a minute while others measure, so it looks into `config.RACE_FILE` of the
    study's folder again when it has the device (`openpi_opt.trial`).
    """

    best_ms: float | None = None
    factor: float | None = None

    def limits(self, cfg: Config) -> Config:
        """The same configuration, hash included."""
        changed = {"best_ms": self.best_ms, "race": self.factor}
        return cfg.model_copy(update={"limits": cfg.limits.model_copy(update=changed)}).raced()


@dataclass
class Trials:
    """Starts jobs and keeps their results."""

    ledger: Ledger
    executor: Executor
    machine: Machine
    display: Display
    space: str
    new: int = 0

    def claim(self, job: Job) -> bool:
        """Get the right to measure; False while somebody else has it. Then look for a record."""
        job.claim = self.ledger.claim(job.cfg, self._space(job))
        return job.claim is not None

    def start(self, job: Job, lease: Lease, race: Race) -> Future[TrialResult]:
        """Start the trial's process; what is surely slower than its race is not measured to the
        end.

        Raises:
            UserError: its folder cannot be made.
        """
        job.lease = lease
        gpu = lease.slot.gpu
        try:
            job.folder, job.alive = self.ledger.started(
                job.cfg, job.role, job.params, self._space(job), job.uid, gpu
            )
        except OSError as error:
            raise cannot_run(self.ledger.study_dir, error) from error
        assert job.claim is not None
        self.display.begin(lease.slot.name, f"{job.position} {job.title}")
        task = Task(
            cfg=race.limits(job.cfg),
            uid=job.uid,
            folder=job.folder,
            machine_hash=self.ledger.fingerprint_hash(job.cfg),
            fds=(job.claim.fd, job.alive.fd),
        )
        return self.executor.start(task, lease)

    def keep(self, job: Job, result: TrialResult) -> Record:
        """Journal a result, then let go of device and claim: it cannot be lost any more.

        Raises:
            UserError: the journal cannot be written.
        """
        gpu = job.lease.slot.gpu if job.lease else None
        record = self.ledger.keep(
            *(job.cfg, result, job.role, job.params, job.uid, job.folder),
            space=self._space(job),
            gpu=gpu,
        )
        job.let_go(done=True)
        self.new += 1
        return record

    def _space(self, job: Job) -> str:
        """A baseline is no point of the space."""
        return "" if job.proposal is None else self.space


def cannot_run(folder: Path, error: OSError) -> UserError:
    """The host that refuses a process or a file is the user's to mend."""
    mend = "Free space, memory or permissions"
    return unusable(f"run a trial in {folder}", folder, error, mend)


def lost_result(cfg: Config, folder: Path, error: LostError) -> Failed:
    """What a trial is that was lost for good."""
    return Failed(
        outcome=error.outcome,
        reason=f"ended with the node or process that ran it: {error}"[:500],
        phase=error.phase or "start",
        log_tail=log_tail(folder / "log.txt"),
        files=identity.noted(folder),
        config=cfg.dump(),
        config_hash=cfg.hash(),
        context_hash=cfg.context_hash(),
        started_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def refused(cfg: Config, machine: Machine) -> Refused | None:
    """The result without a process, when something says that `cfg` cannot run here."""
    checks = [partial(knob.check, cfg, machine) for knob in KNOBS]
    for check in (*checks, partial(tools.refusal, cfg)):
        refusal = check()
        if refusal is not None:
            return Refused(
                outcome=refusal.outcome,
                reason=refusal.reason,
                config=cfg.dump(),
                config_hash=cfg.hash(),
                context_hash=cfg.context_hash(),
                started_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
    return None


def label(cfg: Config, role: Role, params: dict[str, str]) -> str:
    """What tells a trial apart on the screen.

    A few swept keys as they are; of many the knobs that differ from the baseline, without those
    that no key sweeps: they are the same in all trials.
    """
    if role == "baseline":
        return "baseline"
    if 0 < len(params) <= _FEW:
        return _shown(params)
    plain, own = cfg.baseline().labels(), cfg.canonical().labels()
    heads = {key.split(".")[0] for key in params} or set(own)
    others = {key: text for key, text in params.items() if key.split(".")[0] not in own}
    changed = {k: text for k, text in own.items() if k in heads and text != plain[k]}
    return _shown({**others, **changed}) or "defaults"


def _shown(params: Mapping[str, str]) -> str:
    return " ".join(f"{key}={text}" for key, text in params.items())
