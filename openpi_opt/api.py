"""Studies from Python: `openpi_opt.sweep(...)`, `openpi_opt.load_study(...)`.

The same code as the verbs, for notebooks and programs: what goes wrong raises `UserError`, and
nothing exits the interpreter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from openpi_opt.config import Config
from openpi_opt.criteria import Criteria
from openpi_opt.errors import UserError
from openpi_opt.figures import FIGURES
from openpi_opt.result import parse_plain
from openpi_opt.track.fingerprint import fingerprint_hash
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.report import Row, rows
from openpi_opt.track.store import DEFAULT_STORE, Store

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Study:
    """A study in a store, as its journal has it now: each look reads what was added."""

    name: str
    store: Store

    @property
    def records(self) -> list[Record]:
        """All records, confirmations included, in the order of their numbers."""
        return Journal.read(self._folder).records()

    @property
    def trials(self) -> pd.DataFrame:
        """One row for each trial: what differs, the outcome, every figure, milliseconds by stage.
        Columns of figures are those of `python -m openpi_opt.figures`; what was not measured is
        NaN. Imports pandas."""
        import pandas as pd

        return pd.DataFrame([_plain(row) for row in self._rows()]).set_index("number")

    @property
    def best(self) -> pd.Series | None:
        """The row of the best trial of the newest context, None when no trial is ok."""
        numbers = [row.record.number for row in self._rows() if row.best]
        return self.trials.loc[numbers[-1]] if numbers else None

    def promote(self, name: str, minutes: float | None = None, *arguments: str) -> Path:
        """Confirm the best as a preset, in fresh processes; returns the preset's file. `arguments`
        are further words of `python -m openpi_opt.promote`. Raises UserError: nothing could be
        promoted, or the time is too short."""
        from openpi_opt import promote
        from openpi_opt.preset import preset_path

        words = [self.name, "--store", str(self.store.path), "--name", name, *arguments]
        if minutes is not None:
            words += ["--minutes", str(minutes)]
        if promote.main(words) != 0:
            raise UserError(f"study {self.name}: no preset was written; the lines above say why.")
        folder = words[words.index("--preset-dir") + 1] if "--preset-dir" in words else None
        return preset_path(name, None if folder is None else Path(folder))

    def report(self, out: str | Path | None = None) -> Path:
        """Write the study as one HTML file; returns it."""
        from openpi_opt.report import write

        return write([self._folder], None if out is None else Path(out))

    def _rows(self) -> list[Row]:
        criteria = Criteria.load(self._folder)
        return rows([r for r in self.records if r.role != "confirm"], criteria=criteria)

    @property
    def _folder(self) -> Path:
        return self.store.find_study(self.name)


def load_study(name: str, store: str | Path = DEFAULT_STORE) -> Study:
    """A study of a store. Raises UserError: no such store or study."""
    opened = Store.open(store, create=False)
    opened.find_study(name)
    return Study(name, opened)


def load_results(folder: str | Path, store: str | Path, name: str = "recorded") -> Study:
    """Result documents of a folder (`experiments/*/results`) as a study of a store. Raises
    UserError: the folder has no result document, or one that cannot be read."""
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise UserError(f"{folder}: no result documents (*.json) are there.")
    opened = Store.open(store)
    journal = Journal.open(opened.study_dir(name))
    for path in paths:
        try:
            result = parse_plain(json.loads(path.read_bytes()))
        except (ValueError, ValidationError) as error:
            raise UserError(f"{path} is no result of this project: {error}") from None
        cfg = Config.load(result.config)
        uid = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        journal.append(
            Record(
                uid=uid,
                study=name,
                role="baseline" if cfg.is_baseline() else "trial",
                labels=cfg.labels(),
                result=result,
                fingerprint_hash=fingerprint_hash(result.fingerprint),
            )
        )
    return load_study(name, store)


def sweep(
    overrides: Sequence[str], study: str | None = None, store: str | Path = DEFAULT_STORE
) -> Study:
    """Run a sweep here, with progress on stderr and its table on stdout.

    `overrides` are the words of `python -m openpi_opt.sweep -m`, for instance
    `["attention=eager,sdpa", "model=pi0_mini"]`.

    Raises:
        UserError: bad input, or no trial was ok.
        KeyboardInterrupt: what was finished is kept; the same call goes on.
    """
    from openpi_opt import sweep as verb
    from openpi_opt.space.settings import default_study_name

    name = study or default_study_name(overrides)
    words = ["-m", *overrides, f"study={name}", f"store={Path(store).absolute()}"]
    code = verb.main(words)
    if code != 0:
        raise UserError(f"study {name}: no trial was ok; the lines above say why.")
    return load_study(name, store)


def _plain(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {"number": row.record.number, "role": row.record.role}
    found |= {"outcome": row.record.result.outcome, **row.differs}
    found |= {"vs_baseline": row.vs_baseline, "best": row.best, "reason": row.reason}
    for figure in FIGURES.values():
        value = figure.value(row.ok) if row.ok else None
        found[figure.key] = value if isinstance(value, int | float) else None
    stages = row.ok.kernels.stage_ms if row.ok and row.ok.kernels else {}
    found |= {f"{name}_ms": value for name, value in stages.items()}
    return found
