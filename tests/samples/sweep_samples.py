"""Sweeps in this process, with the trial's process replaced by a function."""

from collections.abc import Callable
from pathlib import Path

import optuna
from hosts import optuna_study
from search_samples import CPU, FakeRun, ok

from openpi_opt.config import Config
from openpi_opt.engine.plan import StudyRequest
from openpi_opt.engine.study import StudyOutcome, run_study
from openpi_opt.result import TrialResult
from openpi_opt.space.settings import Settings
from openpi_opt.space.space import Space, parse_override
from openpi_opt.track.journal import Journal, Record


class Screen:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ended: list[tuple[str, bool]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, slot: str, title: str) -> None: ...

    def phase(self, slot: str, name: str) -> None: ...

    def stop(self, slot: str) -> None: ...

    def end(self, position: str, label: str, record: Record, known: bool, remark: str = "") -> None:
        self.ended.append((label, known))


def compose(overrides: list[str]) -> Config:
    """Keys with one dot, and the groups that name one value; no tracking server."""
    raw: dict[str, dict] = {"tracking": {"mlflow": False}}
    for line in overrides:
        override = parse_override(line)
        key, value = override.get_key_element(), override.value()
        if key == "attention":
            raw[key] = dict.fromkeys(("vision", "prefill", "denoise"), value)
        elif key in ("compile", "graph"):
            raw[key] = {"mode": value}
        else:
            section, _, name = key.partition(".")
            raw.setdefault(section, {})[name] = value
    return Config.parse(raw)


def by_seed(cfg: Config) -> TrialResult:
    return ok(cfg, 10.0 + cfg.weights.seed)


class Sweeps:
    def __init__(self, folder: Path):
        self.folder = folder
        self.screen = Screen()

    def __call__(
        self,
        *overrides: str,
        judge: Callable[[Config], TrialResult] = by_seed,
        swept: bool = True,
        compose: Callable[[list[str]], Config] = compose,
        **settings: object,
    ) -> tuple[StudyOutcome, FakeRun]:
        run = FakeRun(judge)
        self.screen = Screen()
        parsed = Settings.parse({"store": str(self.folder), **settings})
        request = StudyRequest("study", Space.parse(overrides), parsed, CPU, (), swept)
        return run_study(request, compose, self.screen, run), run

    @property
    def journal(self) -> list[Record]:
        return Journal.read(self.folder / "studies" / "study").records()

    def optuna(self) -> list[optuna.trial.FrozenTrial]:
        found = optuna_study(self.folder, "study").get_trials()
        return [trial for trial in found if trial.state.name != "FAIL"]
