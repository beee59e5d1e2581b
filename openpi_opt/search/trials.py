"""One trial from end to end: looked up, refused or run, then kept, told and delivered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from uuid import uuid4

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.knobs import KNOBS
from openpi_opt.machine import Machine
from openpi_opt.result import Refused, TrialResult
from openpi_opt.search.display import Display
from openpi_opt.search.ledger import Ledger
from openpi_opt.track.journal import Record, Role
from openpi_opt.track.store import Store

Run = Callable[[Config, Path, Path, Callable[[str], None], Machine], TrialResult]


@dataclass
class Trials:
    """Runs trials one after another on one machine."""

    store: Store
    ledger: Ledger
    machine: Machine
    display: Display
    run: Run
    new: int = 0

    def conduct(
        self,
        cfg: Config,
        role: Role,
        params: dict[str, str],
        position: str,
        tell: Callable[[TrialResult], None] | None = None,
    ) -> tuple[Record, bool]:
        """The record of `cfg`, and whether it was known before.

        The order matters: what is in the journal is safe, so Optuna hears of it only then, and
        MLflow, which may be slow or away, last.

        Raises:
            UserError: the store cannot be written.
        """
        known = self.ledger.find(cfg)
        if known is not None:
            if tell is not None:
                tell(known.result)
            return known, True
        record = self._measure(cfg, role, params, position)
        self.new += 1
        if tell is not None:
            tell(record.result)
        self.ledger.deliver(record)
        self.display.end(position, label(cfg, role, params), record, known=False)
        return record, False

    def _measure(self, cfg: Config, role: Role, params: dict[str, str], position: str) -> Record:
        uid = uuid4().hex
        folder: Path | None = None
        result: TrialResult | None = refused(cfg, self.machine)
        if result is None:
            folder = self.ledger.study_dir / "trials" / uid[:12]
            self.display.begin(position, label(cfg, role, params))
            result = self._run(cfg, folder)
        return self.ledger.keep(cfg, result, role, params, uid, folder)

    def _run(self, cfg: Config, folder: Path) -> TrialResult:
        try:
            return self.run(cfg, folder, self.store.references, self.display.phase, self.machine)
        except OSError as error:
            raise UserError(
                f"cannot run a trial in {folder}: {error.strerror or error}.\n"
                "Everything recorded before is kept. Free space, memory or permissions, then run "
                "the same command again to continue."
            ) from error


def refused(cfg: Config, machine: Machine) -> Refused | None:
    """The result without a process, when a knob says that `cfg` cannot run here."""
    for knob in KNOBS:
        refusal = knob.check(cfg, machine)
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
    """What tells a trial apart on the screen."""
    if role == "baseline":
        return "baseline"
    plain = cfg.baseline().labels()
    shown = params or {k: text for k, text in cfg.labels().items() if text != plain[k]}
    return " ".join(f"{key}={text}" for key, text in shown.items()) or "baseline"
