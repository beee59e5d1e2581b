"""What a knob is: one dimension of choice, a Hydra group and a module of the same name.

Knob modules are imported by the controller, which must start fast and must not create a GPU
context, so they import torch only inside the methods that run in a trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar, cast

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

    from openpi_opt.config import Model, Platform, Workload
    from openpi_opt.machine import Device, Machine
    from openpi_opt.pi0.inputs import Inputs
    from openpi_opt.pi0.policy import Pi0Policy

    Call = Callable[[Inputs], torch.Tensor]


class Options(BaseModel):
    """Base of every knob's options: unknown keys are refused, values never change. The defaults of
    the fields are the baseline's: the plain eager policy."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def given(self) -> dict[str, Any]:
        """By dotted name, the values that differ from their defaults, of nested options too."""
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Options):
                found |= {f"{name}.{key}": inner for key, inner in value.given().items()}
            elif value != field.get_default(call_default_factory=True):
                found[name] = value
        return found


class Configuration(Protocol):
    """What a knob may read of a configuration, of which `openpi_opt.config.Config` is one."""

    @property
    def knobs(self) -> Mapping[str, Any]:
        """The options of every knob, by its name."""

    @property
    def model(self) -> Model:
        """Which network."""

    @property
    def platform(self) -> Platform:
        """Where it runs; `device` below is the resolved one."""

    @property
    def workload(self) -> Workload:
        """What is inferred."""

    @property
    def device(self) -> Device:
        """The resolved device."""


# The stages of an inference, as a profile names them.
STAGES = ("vision", "prefill", "denoise")

O = TypeVar("O", bound=Options)  # noqa: E741


@dataclass(frozen=True)
class Refusal:
    """Why a configuration does not run: this machine lacks something, or options contradict."""

    outcome: Literal["unavailable", "invalid"]
    reason: str


class Knob(Generic[O]):
    """One dimension of choice. Subclasses override what they need.

    `refusals`, `canonical`, `environment` and `label` run in the controller (no torch);
    `configure`, `fold`, `transform` and `wrap` run in the trial, in this order, over the knobs that
    act, in the order of `openpi_opt.knobs.KNOBS`.
    """

    name: ClassVar[str]
    options_type: type[O]
    # Stages whose time an option can change, by the option's dotted name below the knob or the
    # first part of it. What is not named can change all of them. A search learns by it: a stage's
    # time teaches nothing about an option that does not touch the stage.
    stages: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    # Values by option whose first call takes minutes. A search does not begin with them, and one of
    # a short budget leaves them out.
    slow: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # Values by option with which a trial is short: a search begins with them.
    quick: ClassVar[Mapping[str, str]] = {}
    # Options whose default is what measuring found best, such as a table of launch parameters: a
    # search expects little of others.
    tuned: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def touches(cls, option: str) -> tuple[str, ...]:
        """The stages that the option (dotted, below the knob) can change."""
        parts = option.split(".")
        names = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((cls.stages[name] for name in names if name in cls.stages), STAGES)

    def of(self, cfg: Configuration) -> O:
        """This knob's options in `cfg`."""
        return cast("O", cfg.knobs[self.name])

    def refusals(self, cfg: Configuration, machine: Machine) -> Iterator[Refusal]:
        """The reasons why this cannot run here or contradicts another option."""
        yield from ()

    def check(self, cfg: Configuration, machine: Machine) -> Refusal | None:
        """The first of `refusals`, or None."""
        return next(self.refusals(cfg, machine), None)

    def canonical(self, cfg: Configuration) -> O:
        """Options with everything that has no effect under `cfg` set to its neutral value."""
        return self.of(cfg)

    def acts(self, cfg: Configuration) -> bool:
        """Whether the knob is applied: by default unless its canonical options are the defaults.

        What is not applied cannot change a number, so its module is no part of a result's identity.
        """
        return bool(self.canonical(cfg) != self.options_type())

    def environment(self, cfg: Configuration) -> Mapping[str, str]:
        """Variables that must be in the process environment before torch is imported."""
        return {}

    def times_kernels(self, cfg: Configuration) -> bool:
        """Whether the first call times kernels to choose some: it has the device for itself."""
        return False

    def configure(self, cfg: Configuration) -> None:
        """Process-wide settings of torch, Dynamo and Inductor."""

    def fold(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Algebra on the weights while they are float32 as loaded: each is rounded once, after."""

    def transform(self, policy: Pi0Policy, cfg: Configuration) -> None:
        """Surgery on the loaded policy: cast, fuse, swap an operation."""

    def wrap(self, call: Call, cfg: Configuration) -> Call:
        """Wrap the whole call, for instance with a captured graph."""
        return call

    def files(self, cfg: Configuration) -> Mapping[str, str]:
        """Files of the user's that the trial reads: option (dotted, below the knob) -> its path.
        Their content, not their place, is part of the configuration: `Config.hash` puts it in the
        place of the path. `check` refuses a file that is not there."""
        return {}

    def lossy(self, cfg: Configuration) -> bool:
        """Whether the numbers are deliberately coarser than the precision says (fp8). Such a trial
        is held to `guard.lossy_cap`, and does not compete with lossless ones."""
        return False

    def float32_form(self, cfg: Configuration) -> O:
        """The options of the same structure in float32, for the guard. What chooses how to run or
        round, and not what is computed, becomes neutral. An operation that exists in 16 bits alone
        becomes a plain one: the guard compares it by itself (`openpi_opt.guarding.structure`)."""
        return self.canonical(cfg)

    def notes(self, cfg: Configuration) -> list[str]:
        """What the record of a trial must say beside its numbers; asked in the trial, at its end.
        One sentence each: an option that was asked for and that nothing reads, a library that
        served only part of what was routed to it."""
        return []

    def label(self, options: O) -> str:
        """Short text for tables: the value of the first field, then the fields that differ from
        their defaults, of nested options too; a switch that is on by its name alone."""
        head = next(iter(type(options).model_fields))
        words = [str(getattr(options, head))]
        for name, value in options.given().items():
            if name != head:
                words.append(name if value is True else f"{name}={value}")
        return " ".join(words)


AnyKnob = Knob[Any]
