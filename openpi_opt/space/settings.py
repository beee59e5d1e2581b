"""The keys of `conf/sweep.yaml` that steer a sweep and do not belong to a trial."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from openpi_opt.config import validated
from openpi_opt.criteria import Criteria, ObjectiveName, in_order
from openpi_opt.errors import UserError, first_reason
from openpi_opt.figures import LIMITS
from openpi_opt.process.devices import DeviceSettings
from openpi_opt.space.named import NamedSpace
from openpi_opt.space.space import Space, head, parse_override

SamplerName = Literal["auto", "grid", "stages", "tpe", "random", "gp"]
# Where a study is kept and what is looked at afterwards change no result.
_NOT_IDENTITY = ("tracking", "limits", "profile", "hydra")
# These settings say what is tried and what wins, so they belong to a study's identity.
_DECIDING = ("space", "objective")
_LONGEST_TEXT = 60
_DEFAULT_TRIALS = 50
_TRIALS_WITHOUT_LIMIT = 1_000_000
_OBJECTIVES = ("objective", "objective.minimize")
_LISTED = {"devices": "devices=[0,1]", **dict.fromkeys(_OBJECTIVES, "objective=[latency,memory]")}
_JUDGING = tuple(f"limits.{name}" for name in LIMITS)


class Objective(BaseModel):
    """What counts as better. Lossy configurations (FP8) win only when asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    minimize: tuple[ObjectiveName, ...] = ("latency",)
    allow_lossy: bool = False

    @field_validator("minimize")
    @classmethod
    def _in_order(cls, value: tuple[ObjectiveName, ...]) -> tuple[ObjectiveName, ...]:
        """As `Criteria` has them, which says what is admitted."""
        try:
            return Criteria(objectives=value).objectives
        except ValidationError as error:
            raise ValueError(first_reason(error)) from None


class LocalSettings(BaseModel):
    """Trials run on this host."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["local"] = "local"


class RaySettings(BaseModel):
    """Trials run on the nodes of a Ray cluster: a task each, with one GPU. `resources` names what a
    node must have (accelerator_type:H100, or its own), `cpus` says how many of Ray's a trial takes
    (null: its share), `slots` how many trials run at a time (null: what there is room for)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["ray"]
    address: str = Field("auto", min_length=1)
    slots: int | None = Field(None, ge=1, le=1000)
    cpus: int | None = Field(None, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)


# One line without blanks and control characters, as sbatch takes it.
SbatchText = Annotated[str, Field(pattern=r"^[!-~]+$", max_length=500)]


class SlurmSettings(BaseModel):
    """Trials run as jobs of Slurm, one each, `slots` of them queued or running at a time. `gpus` of
    a job (0: trials on the CPU); `gres` instead, where a model has to be named. `minutes` is a
    job's time limit (null: what the limits of the trial's phases add up to)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["slurm"]
    cluster: Literal["slurm", "local"] = "slurm"
    slots: int = Field(1, ge=1, le=1000)
    gpus: Literal[0, 1] = 1
    gres: SbatchText | None = None
    cpus: int | None = Field(None, ge=1)
    memory_gb: float | None = Field(None, gt=0, allow_inf_nan=False)
    minutes: int | None = Field(None, ge=1)
    partition: SbatchText | None = None
    account: SbatchText | None = None
    qos: SbatchText | None = None
    constraint: SbatchText | None = None
    nodelist: SbatchText | None = None
    exclude: SbatchText | None = None


ExecutorSettings = Annotated[
    LocalSettings | RaySettings | SlurmSettings, Field(discriminator="kind")
]


class Settings(BaseModel):
    """How to search and where to keep what is found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: str | None = None
    store: str = Field("mlruns", min_length=1)
    n_trials: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0, allow_inf_nan=False)
    sampler: SamplerName = "auto"
    seed: int = Field(0, ge=0, lt=2**32)
    baseline: bool = True
    objective: Objective = Objective()
    space: NamedSpace = NamedSpace()
    start: tuple[str, ...] | None = None
    dry_run: int | None = Field(None, ge=1)
    fresh: bool = False
    keep_source: bool = False
    devices: DeviceSettings = DeviceSettings()
    pruning: Annotated[float, Field(ge=1, allow_inf_nan=False)] | Literal["auto"] | None = "auto"
    executor: ExecutorSettings = LocalSettings()
    storage: str | None = Field(None, min_length=1)

    @property
    def most_trials(self) -> int:
        """`n_trials`; where it is null, 50, or with `minutes` as many as fit."""
        if self.n_trials is not None:
            return self.n_trials
        return _DEFAULT_TRIALS if self.minutes is None else _TRIALS_WITHOUT_LIMIT

    @model_validator(mode="after")
    def _chosen_elsewhere(self) -> Settings:
        if self.executor.kind != "local" and self.devices.gpus != "all":
            raise ValueError(
                f"devices names GPUs of this host, and with executor={self.executor.kind} the "
                "engine chooses. Leave out devices=[...]"
            )
        return self

    @field_validator("start", mode="before")
    @classmethod
    def _all_or_one(cls, value: Any) -> Any:
        """`start=all` and `start=NAME`."""
        return None if value == "all" else [value] if isinstance(value, str) else value

    @field_validator("study", "store", mode="before")
    @classmethod
    def _a_number_is_a_name_too(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (int, float)) else value

    @staticmethod
    def parse(composed: Mapping[str, Any]) -> Settings:
        """Pick the settings out of a composed mapping. Raises UserError: a value of the wrong type
        or out of range."""
        picked = {name: composed[name] for name in Settings.model_fields if name in composed}
        settings: Settings = validated(Settings, picked, unions=("executor", "pruning"))
        return settings


def check_not_swept(space: Space) -> None:
    """Refuse a sweep over a setting: one study has one of each. Raises UserError: names the key."""
    for key in space.dimensions:
        bare = key.lstrip("+~")
        if bare in _JUDGING:
            raise UserError(
                f"{key} judges all trials of a study and cannot itself be swept.\n"
                "Give it one value. Another value later judges the same results again."
            )
        if bare.split(".")[0] in Settings.model_fields:
            hint = f"Give {key} one value and start one sweep for each."
            if example := _LISTED.get(bare):
                hint = f"Write several in one list: {example}."
            raise UserError(f"{key} steers the whole sweep and cannot itself be swept.\n{hint}")


def identity(overrides: Sequence[str]) -> list[str]:
    """The overrides that decide what is measured and what wins, in the order written."""
    ignored = {*Settings.model_fields, *_NOT_IDENTITY} - {*_DECIDING}
    deciding = (
        _plain_objective(line) for line in overrides if head(parse_override(line)) not in ignored
    )
    return [line for line in deciding if line]


def _plain_objective(line: str) -> str:
    """One spelling for the same objectives; empty for the latency alone, which is the default."""
    override = parse_override(line)
    value = override.value()
    if override.key_or_group not in _OBJECTIVES or not isinstance(value, (str, list)):
        return line
    return objective_text([value] if isinstance(value, str) else [str(name) for name in value])


def objective_text(names: Sequence[str]) -> str:
    """Objectives as a part of a study's identity, empty for the latency alone."""
    return "" if [*names] == ["latency"] else f"objective={','.join(in_order(names))}"


def default_study_name(overrides: Sequence[str], today: datetime | None = None) -> str:
    """A name from the UTC date and the overrides: the same for the same command on the same day.
    The text is for people and may be cut; the hash tells apart what reads the same."""
    deciding = identity(overrides)
    day = (today or datetime.now(timezone.utc)).strftime("%Y%m%d")
    text = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", "+".join(deciding))[:_LONGEST_TEXT].strip("-+.,")
    digest = hashlib.sha256("\n".join(deciding).encode()).hexdigest()[:6]
    return f"{day}-{text or 'defaults'}-{digest}"
