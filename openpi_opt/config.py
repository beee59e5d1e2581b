"""The schema of `conf/`: what a configuration may hold, its canonical form and its hash.

Hydra composes YAML and overrides; `Config.parse` turns the result into a validated, immutable
value. Nothing here touches a device, a network or torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo

from openpi_opt import checkpoint_file
from openpi_opt.errors import UserError, near
from openpi_opt.figures import LIMITS
from openpi_opt.knobs import BY_NAME, KNOBS
from openpi_opt.knobs.base import Options
from openpi_opt.machine import Device, Machine
from openpi_opt.paths import content_of
from openpi_opt.vendor import BY_DEVICE, DEVICES

# In a study's folder: the fastest so far, by context.
RACE_FILE = "race.json"
MIN_WARMUP = 3
MIN_ITERATIONS = 10
# The guard's float32 reference holds 3.5 B parameters in 14 GB, activations and the KV cache
# come on top.
PI0_MEMORY_MIB = 20_000
# `measure.max_seconds` where it is null. A GPU alone reaches 0.5% within 20 s. A CPU, which others
# use and whose clock moves, seldom does in any time: there the interval that was reached is told.
GPU_SECONDS, CPU_SECONDS = 20.0, 5.0


class Section(BaseModel):
    """Base of the sections: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """Which network: the 3.5 B policy, its successor of 3.6 B, or either graph in small for CPUs.

    `rope_frequencies` is part of the model's definition: openpi's PyTorch rounds the rotary
    frequencies to bfloat16, and so does LeRobot's in its bfloat16 mode; JAX and LeRobot's default
    keep them in float32. `auto` does as the checkpoint's origin does, and rounds without one.
    """

    name: Literal["auto", "pi0", "pi0_mini", "pi05", "pi05_mini"] = "auto"
    rope_frequencies: Literal["auto", "bfloat16", "float32"] = "auto"

    @property
    def family(self) -> checkpoint_file.Family:
        """What the network is, whatever its size; `auto` is a pi0 unless a checkpoint says else."""
        return "pi05" if self.name.startswith("pi05") else "pi0"


class Weights(Section):
    """Seeded random weights, or a checkpoint (a safetensors file or its folder)."""

    kind: Literal["random", "checkpoint"] = "random"
    seed: int = Field(0, ge=0)
    path: str | None = None

    @model_validator(mode="after")
    def _path_belongs_to_checkpoint(self) -> Weights:
        if (self.kind == "checkpoint") != (self.path is not None):
            raise ValueError(
                "weights=checkpoint needs weights.path=FILE_OR_FOLDER, and only it takes a path"
            )
        return self


class Workload(Section):
    """What is inferred. `prompt_tokens` of the `prompt_slots` are valid, the rest is padding.

    `layout: exact` is built for these cameras and this number of tokens and refuses others;
    `flexible` serves any prompt up to `prompt_slots` and any of `active_cameras` without another
    capture, and is measured with these.
    """

    name: str = "custom"
    active_cameras: tuple[bool, ...] = (True, True, True)
    prompt_slots: int = Field(20, ge=1)
    prompt_tokens: int = Field(20, ge=1)
    horizon: int = Field(10, ge=1)
    steps: int = Field(10, ge=1)
    batch_size: int = Field(1, ge=1)
    layout: Literal["exact", "flexible"] = "exact"
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _something_to_see(self) -> Workload:
        if not any(self.active_cameras):
            raise ValueError("active_cameras needs at least one true")
        if self.prompt_tokens > self.prompt_slots:
            raise ValueError(
                f"prompt_tokens={self.prompt_tokens} exceeds prompt_slots={self.prompt_slots}"
            )
        return self


def _known_device(device: str) -> str:
    if device not in ("auto", *DEVICES):
        raise ValueError(f"unknown, use auto or one of {', '.join(DEVICES)}")
    return device


class Platform(Section):
    """Where the trial runs. `gpu` counts the visible GPUs of that kind; None: any free one."""

    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    gpu: int | None = Field(None, ge=0)


class Measure(Section):
    """How latency is sampled. The minima are the field's rule: fewer says nothing.

    Calls are planned until the 95% interval of their mean and of their median is within `rel_ci`
    of it (half-width). Then that number and a margin are measured and reported
    (`measure/planning.py`). At least `iterations` and at most `max_iterations` are reported;
    planning and measuring together are laid out for `max_seconds`, which `Config.resolved` fills
    in where it is null, by the device. `rel_ci` null measures exactly `iterations`.

    `exclusive`: one trial of the host measures at a time, while others load and compile.
    """

    warmup: int = Field(5, ge=MIN_WARMUP)
    iterations: int = Field(30, ge=MIN_ITERATIONS)
    rel_ci: float | None = Field(0.005, gt=0, le=0.5)
    max_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_iterations: int = Field(10_000, ge=MIN_ITERATIONS, le=1_000_000)
    exclusive: bool = False

    @model_validator(mode="after")
    def _room_for_the_least(self) -> Measure:
        if self.rel_ci is not None and self.max_iterations < self.iterations:
            raise ValueError(
                f"max_iterations={self.max_iterations} is below iterations={self.iterations}, "
                "the least that are measured"
            )
        return self

    @property
    def seconds(self) -> float:
        """The resolved `max_seconds`; an assertion fails before `Config.resolved`."""
        assert self.max_seconds is not None
        return self.max_seconds


class Profile(Section):
    """What is looked at after the timed iterations; never during them.

    `energy`: over `energy_seconds` of calls; auto: where the machine tells it, and in a sweep of
    trials about as fast as the best so far; true: always, and refuse the trial where the machine
    does not tell it. `roofline`: against ceilings that were measured once on this machine,
    or the vendor's. `trace` keeps the Chrome trace, and what Inductor generated. `tool`: the whole
    trial under that profiler (`openpi_opt/process/run.py`), which counts kernels itself.
    """

    kernels: bool = True
    trace: bool = False
    tool: Literal["none", "rocprofv3", "ncu", "nsys"] = "none"
    energy: bool | Literal["auto"] = "auto"
    energy_seconds: float = Field(3.0, ge=2, allow_inf_nan=False)
    roofline: Literal["measured", "datasheet", "none"] = "measured"


class Guard(Section):
    """How far a candidate's actions may be from the float32 reference.

    A candidate passes when its relative L2 distance is at most `factor` times the distance of the
    plain eager policy in the same precision on the same inputs, but never more than `cap`;
    `floor` is the least tolerance, for float32, where the plain distance is zero. A lossy
    configuration (fp8) may be `factor` times as far away as its own rounding, written plainly, and
    never more than `lossy_cap`.

    `inputs` counts the ordinary inputs. `observations` names a safetensors file of the user's own,
    which are compared as well (`openpi_opt/guarding/cases.py`). `seconds` is how long a sweep on a
    CPU asks mistakes made on purpose, after its table; on a GPU the baseline's trial asks all.
    """

    inputs: int = Field(3, ge=2)
    factor: float = Field(2.0, gt=0)
    floor: float = Field(1e-5, gt=0)
    cap: float = Field(0.05, gt=0)
    lossy_cap: float = Field(0.25, gt=0)
    observations: str | None = None
    seconds: float = Field(10.0, ge=0)


_JUDGED: dict[str, Any] = {
    name: (float | None, Field(None, gt=0, allow_inf_nan=False)) for name in LIMITS
}


class Limits(create_model("_Judged", __base__=Section, **_JUDGED)):  # type: ignore[misc]
    """Longest time in seconds for each phase of a trial; past it the trial is ended.

    `latency_ms`: a call that is surely slower is not measured to the end (see `pruning`).
    `best_ms`: the fastest of the sweep so far, for `profile.energy=auto`, and `race`: how many
    times slower than the fastest a trial may be; the sweep fills both in.
    `latency_ms` and the limits of all other figures (`figures.LIMITS`) judge results: above one of
    them a trial is never the best. They change no measurement, so they do not belong to a
    configuration's identity. `compile_seconds` is the first call as it was seen: less with warm
    caches.
    """

    load: float = Field(600, gt=0)
    reference: float = Field(1200, gt=0)
    compile: float = Field(900, gt=0)
    warmup: float = Field(300, gt=0)
    guard: float = Field(300, gt=0)
    measure: float = Field(900, gt=0)
    profile: float = Field(300, gt=0)
    energy: float = Field(300, gt=0)
    ceilings: float = Field(300, gt=0)
    latency_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    best_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    race: float | None = Field(None, ge=1, allow_inf_nan=False)


class Tracking(Section):
    """MLflow. `MLFLOW_TRACKING_URI` wins over the local store."""

    mlflow: bool = True
    experiment: str = "openpi-opt"


# What decides the number that is measured, besides the knobs: trials are compared with one
# another, and with the baseline, only where these are equal.
CONTEXT_SECTIONS = ("model", "weights", "workload", "platform", "measure", "guard")


class Config(BaseModel):
    """One configuration of one trial."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Model = Model()
    weights: Weights = Weights()
    workload: Workload = Workload()
    platform: Platform = Platform()
    measure: Measure = Measure()
    profile: Profile = Profile()
    guard: Guard = Guard()
    limits: Limits = Limits()
    tracking: Tracking = Tracking()
    knobs: dict[str, SerializeAsAny[Options]] = Field(default_factory=dict)

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> Config:
        """Validate a composed mapping whose top-level keys are sections and knobs. Raises
        UserError: unknown key or value out of range, naming the key, the value given and what is
        admitted."""
        for key in raw:
            if key not in SCHEMAS:
                raise UserError(unknown_key(str(key)))
        found = {name: validated(kind, raw.get(name, {}), name) for name, kind in SCHEMAS.items()}
        knobs = {name: found.pop(name) for name in BY_NAME}
        return Config(**found, knobs=knobs)

    @staticmethod
    def load(document: Mapping[str, Any]) -> Config:
        """Read what `dump` wrote."""
        raw = dict(document)
        return Config.parse({**raw.pop("knobs"), **raw})

    def dump(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return self.model_dump(mode="json")

    def resolved(self, machine: Machine) -> Config:
        """Replace `auto`, and the null of `measure.max_seconds`, by what this machine has. Raises
        UserError: a device that this machine or the installed torch lacks, a checkpoint that is
        missing, truncated or a pickle, or more time to measure than the phase may take."""
        device = _resolve_device(self.platform, machine)
        measure = self.measure
        if measure.max_seconds is None:
            seconds = GPU_SECONDS if BY_DEVICE[device].is_gpu else CPU_SECONDS
            measure = measure.model_copy(update={"max_seconds": seconds})
        # Not in `parse`, by which documents are read whose defaults were others.
        _check_time(measure, self.limits)
        weights = self.weights
        if weights.path is not None:
            weights = weights.model_copy(update={"path": checkpoint_file.inspect(weights.path)})
        name = self.model.name
        if name == "auto":
            gpus = machine.gpus_for(device)
            # A GPU that tells no memory of its own shares the host's.
            own = gpus[self.platform.gpu or 0].memory_mib or machine.memory_mib if gpus else 0
            roomy = own >= PI0_MEMORY_MIB
            family = "pi0" if weights.path is None else checkpoint_file.family(weights.path)
            small: Literal["pi0_mini", "pi05_mini"] = (
                "pi05_mini" if family == "pi05" else "pi0_mini"
            )
            name = family if roomy else small
        return self.model_copy(
            update={
                "model": self.model.model_copy(
                    update={"name": name, "rope_frequencies": self.rope_frequencies()}
                ),
                "weights": weights,
                "platform": self.platform.model_copy(update={"device": device}),
                "measure": measure,
            }
        )

    def rope_frequencies(self) -> checkpoint_file.RopeFrequencies:
        """The model's, those of its checkpoint's origin where it says `auto`."""
        given = self.model.rope_frequencies
        if given != "auto":
            return given
        path = self.weights.path
        return "bfloat16" if path is None else checkpoint_file.rope_frequencies(path)

    def canonical(self) -> Config:
        """The same configuration with options that have no effect set to neutral values."""
        return self.model_copy(
            update={"knobs": {knob.name: knob.canonical(self) for knob in KNOBS}}
        )

    def baseline(self) -> Config:
        """The plain eager policy under the same model, weights, workload, platform and measure."""
        return self.model_copy(update={"knobs": {k.name: k.options_type() for k in KNOBS}})

    def raced(self, best_ms: float | None = None) -> Config:
        """The same configuration with the limit that follows from the fastest so far. `best_ms` is
        newer than that of the limits; the user's own limit may be lower."""
        limits = self.limits
        best = limits.best_ms if best_ms is None else best_ms
        raced = None if best is None or limits.race is None else limits.race * best
        given = [ms for ms in (limits.latency_ms, raced) if ms is not None]
        changed = {"best_ms": best, "latency_ms": min(given, default=None)}
        return self.model_copy(update={"limits": limits.model_copy(update=changed)})

    def is_baseline(self) -> bool:
        """Whether every knob is at its default."""
        return self.canonical().knobs == self.baseline().canonical().knobs

    @property
    def device(self) -> Device:
        """The resolved device; an assertion fails before `resolved`."""
        assert self.platform.device != "auto"
        return self.platform.device

    def lossy(self) -> bool:
        """Whether some knob computes more coarsely than the precision says."""
        return any(knob.lossy(self) for knob in KNOBS)

    def context(self) -> dict[str, Any]:
        """What two configurations must share for their latencies to be compared."""
        sections = self.model_dump(mode="json", include=set(CONTEXT_SECTIONS))
        del sections["workload"]["name"]  # a label, not a quantity
        del sections["guard"]["seconds"]  # of a sweep, after its trials
        return sections

    def context_hash(self) -> str:
        """Hash of `context` without what is at its default, 12 hexadecimal digits."""
        return _digest(self._changed_context())

    def hash(self) -> str:
        """Hash of the canonical knobs and the context, 12 hexadecimal digits. What is at its
        default is left out: a new knob or option changes no hash. Files that knobs read count by
        their content, at whatever path they lie."""
        canonical = self.canonical()
        changed = canonical.model_dump(mode="json", include={"knobs"}, exclude_defaults=True)
        knobs = {name: values for name, values in changed["knobs"].items() if values}
        for knob in KNOBS:
            for option, path in knob.files(canonical).items():
                *groups, key = option.split(".")
                owner = functools.reduce(dict.__getitem__, groups, knobs[knob.name])
                owner[key] = content_of(path)
        return _digest({"knobs": knobs, **canonical._changed_context()})

    def _changed_context(self) -> dict[str, Any]:
        changed = self.model_dump(mode="json", include=set(CONTEXT_SECTIONS), exclude_defaults=True)
        changed.get("workload", {}).pop("name", None)
        changed.get("guard", {}).pop("seconds", None)
        if self.profile.tool != "none":  # its latency is no answer for the same trial without
            changed["profile"] = {"tool": self.profile.tool}
        return {name: values for name, values in changed.items() if values}

    def labels(self) -> dict[str, str]:
        """Short text of each knob, for tables and MLflow params."""
        return {knob.name: knob.label(self.knobs[knob.name]) for knob in KNOBS}


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation  # type: ignore[misc]
    for name, field in Config.model_fields.items()
    if name != "knobs"
}
# What may stand below each key at the top of a configuration.
SCHEMAS: dict[str, type[BaseModel]] = {**SECTIONS, **{k.name: k.options_type for k in KNOBS}}
# Said beside what is too small, by key.
_WHY_AT_LEAST = {
    "measure.warmup": "the first calls compile and fill caches",
    "measure.iterations": "a mean and a spread need them",
}


def validated(kind: type[BaseModel], raw: Any, name: str = "", unions: Sequence[str] = ()) -> Any:
    """`raw` as a `kind`. Raises UserError: up to three lines, each with the key below `name`, the
    value given and what is admitted. pydantic names the member of each of the `unions`, too."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{name}={_typed(raw)}: expected an option of the group or keys below it.")
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        lines: dict[Any, str] = {}  # one for each key, whatever the members of a union say
        for item in error.errors():
            where = [str(part) for part in item["loc"]]
            if where and where[0] in unions:
                del where[1:2]
            path = ".".join(filter(None, [name, *where]))
            lines.setdefault(tuple(where[:2]), _explained(item, path, below=bool(name)))
        raise UserError("\n".join([*lines.values()][:3])) from None


def _explained(item: Any, path: str, below: bool) -> str:
    if item["type"] == "extra_forbidden" and below:
        return unknown_key(path)
    message = item["msg"].removeprefix("Value error, ").removesuffix(".")
    if path in _WHY_AT_LEAST and item["type"] == "greater_than_equal":
        message = f"at least {item['ctx']['ge']}, since {_WHY_AT_LEAST[path]}"
    whole = item["type"] == "value_error" and isinstance(item["input"], Mapping)
    given = path if whole else f"{path}={_typed(item['input'])}"
    return f"{given}: {message}." if path else f"{message}."


def _typed(value: Any) -> str:
    """A value as it was typed, on one line."""
    return str(value) if str(value).isprintable() else repr(value)


def fields(head: str) -> dict[str, FieldInfo]:
    """Every key below a section or knob, nested ones included: `compile.inductor.freezing`."""
    found: dict[str, FieldInfo] = {}
    waiting: list[tuple[str, Any]] = [(head, SCHEMAS.get(head))]
    for prefix, kind in waiting:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inside = {f"{prefix}.{name}": field for name, field in kind.model_fields.items()}
            found |= inside
            waiting += [(path, field.annotation) for path, field in inside.items()]
    return found


def unknown_key(key: str, known: Iterable[str] = ()) -> str:
    """What to say of a key that no schema has: what there is, and what comes nearest. `known` are
    keys at the top besides those of a configuration."""
    head, _, rest = key.partition(".")
    top = [*SCHEMAS, *known]
    if head not in top:
        return f"unknown group or key {head!r}; known are {', '.join(top)}.{near(head, top)}"
    there = fields(head)
    above = there.get(key.rpartition(".")[0])
    if above is not None and get_origin(above.annotation) is dict:
        return f"{key} is not set, so it is added: +{key}=VALUE."
    below = [path.split(".")[1] for path in there if path.count(".") == 1]
    what = f"{head} has {', '.join(below)}." if below else f"{head} has no {rest}."
    same_name = [path for path in there if path.split(".")[-1] == key.split(".")[-1]]
    rests = [path.removeprefix(f"{head}.") for path in there]
    hint = f" Did you mean {same_name[0]}?" if same_name else near(rest, rests, f"{head}.")
    return f"unknown key {key}; {what}{hint}"


def _check_time(measure: Measure, limits: Limits) -> None:
    if measure.rel_ci is not None and measure.seconds >= limits.measure:
        raise UserError(
            f"measure.max_seconds={measure.seconds:g} is not below "
            f"limits.measure={limits.measure:g}: the trial would be ended while it measures. "
            "Lower the first or raise the second."
        )


def _resolve_device(platform: Platform, machine: Machine) -> Device:
    device = machine.usable_device() if platform.device == "auto" else platform.device
    gpus, vendor = machine.gpus_for(device), BY_DEVICE[device]
    if vendor.is_gpu and not gpus:
        said = "".join(f"{trouble}. " for trouble in machine.troubles if trouble.hides)
        raise UserError(
            f"platform={device}: this machine has no {device.upper()} GPU that is visible. {said}"
            "Use platform=cpu or platform=auto, or check the driver and *_VISIBLE_DEVICES."
        )
    if not machine.built_for(device):
        version = machine.torch.version if machine.torch else "none"
        raise UserError(
            f"platform={device}: the installed torch ({version}) was not built for it. "
            "Install the torch build of your GPU vendor, or use platform=cpu."
        )
    if vendor.is_gpu and platform.gpu is not None and platform.gpu >= len(gpus):
        raise UserError(
            f"platform.gpu={platform.gpu}: this machine shows {len(gpus)} GPU(s), "
            f"counted from 0. Use platform.gpu=0 to {len(gpus) - 1}."
        )
    return device


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Recorded(dict[str, Any]):
    """The knobs of a document, each read when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        return _options(name, json.dumps(self.get(name, {}), sort_keys=True))


@functools.lru_cache(maxsize=65_536)
def _options(name: str, options: str) -> BaseModel:
    return BY_NAME[name].options_type.model_validate_json(options)


@functools.cache
def _plain() -> Config:
    return Config.parse({})


@functools.cache
def plain_labels() -> dict[str, str]:
    """The labels of a configuration whose knobs all are at their defaults."""
    return _plain().labels()


def is_lossy(config: Mapping[str, Any]) -> bool:
    """`Config.lossy` of a recorded configuration, in microseconds: few knobs can be lossy."""
    return _plain().model_copy(update={"knobs": _Recorded(config["knobs"])}).lossy()


def is_plain(config: Mapping[str, Any]) -> bool:
    """`Config.is_baseline` of a recorded configuration, in half a millisecond."""
    return Config.parse(config["knobs"]).is_baseline()
