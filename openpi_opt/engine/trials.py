"""A configuration to measure, its name on the screen, and the results that need no process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from uuid import uuid4

from openpi_opt.config import Config
from openpi_opt.engine.executor import LostError
from openpi_opt.errors import UserError
from openpi_opt.knobs import KNOBS
from openpi_opt.machine import Machine
from openpi_opt.process import tools
from openpi_opt.process.devices import Lease
from openpi_opt.process.locks import Held
from openpi_opt.process.run import log_tail
from openpi_opt.result import Failed, Refused
from openpi_opt.space.optimizer import Proposal
from openpi_opt.track import identity
from openpi_opt.track.journal import Role
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
