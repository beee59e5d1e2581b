"""What a knob is: one dimension of choice, a Hydra group and a module of the same name.

Knob modules are imported by the controller, which must start fast and must not create a GPU
context, so they import torch only inside the methods that run in a trial.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import torch

    from openpi_opt.config import Config
    from openpi_opt.machine import Machine
    from openpi_opt.pi0.inputs import Inputs
    from openpi_opt.pi0.policy import Pi0Policy

    Call = Callable[[Inputs], torch.Tensor]


class Options(BaseModel):
    """Base of every knob's options: unknown keys are refused, values never change.

    The defaults of the fields are the baseline's: the plain eager policy.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


O = TypeVar("O", bound=Options)  # noqa: E741


@dataclass(frozen=True)
class Refusal:
    """Why a configuration does not run: this machine lacks something, or options contradict."""

    outcome: Literal["unavailable", "invalid"]
    reason: str


class Knob(Generic[O]):
    """One dimension of choice. Subclasses override what they need.

    `check`, `canonical`, `environment` and `label` run in the controller (no torch); `configure`,
    `fold`, `transform` and `wrap` run in the trial, in this order, over all knobs in the order of
    `openpi_opt.knobs.KNOBS`.
    """

    name: ClassVar[str]
    options_type: type[O]

    def of(self, cfg: Config) -> O:
        """This knob's options in `cfg`."""
        return cast("O", cfg.knobs[self.name])

    def check(self, cfg: Config, machine: Machine) -> Refusal | None:
        """The reason why this cannot run here or contradicts another option, or None."""
        return None

    def canonical(self, cfg: Config) -> O:
        """Options with everything that has no effect under `cfg` set to its neutral value."""
        return self.of(cfg)

    def environment(self, cfg: Config) -> Mapping[str, str]:
        """Variables that must be in the process environment before torch is imported."""
        return {}

    def configure(self, cfg: Config) -> None:
        """Process-wide settings of torch, Dynamo and Inductor."""

    def fold(self, policy: Pi0Policy, cfg: Config) -> None:
        """Algebra on the weights while they are float32 as loaded: each is rounded once, after."""

    def transform(self, policy: Pi0Policy, cfg: Config) -> None:
        """Surgery on the loaded policy: cast, fuse, swap an operation."""

    def wrap(self, call: Call, cfg: Config) -> Call:
        """Wrap the whole call, for instance with a captured graph."""
        return call

    def files(self, cfg: Config) -> Mapping[str, str]:
        """Files of the user's that the trial reads: option (dotted, below the knob) -> its path.

        Their content, not their place, is part of the configuration: `Config.hash` puts it in the
        place of the path. `check` refuses a file that is not there.
        """
        return {}

    def lossy(self, cfg: Config) -> bool:
        """Whether the numbers are deliberately coarser than the precision says (fp8).

        Such a trial is held to `guard.lossy_cap`, and does not compete with lossless ones.
        """
        return False

    def float32_form(self, cfg: Config) -> O:
        """The options of the same structure in float32, for the guard.

        What chooses how to run or round, and not what is computed, becomes neutral. An operation
        that exists in 16 bits alone becomes a plain one: the guard compares it by itself
        (`openpi_opt.guarding.structure`).
        """
        return self.canonical(cfg)

    def notes(self, cfg: Config) -> list[str]:
        """What the record of a trial must say beside its numbers; asked in the trial, at its end.

        One sentence each: an option that was asked for and that nothing reads, a library that
        served only part of what was routed to it.
        """
        return []

    def label(self, options: O) -> str:
        """Short text for tables: differing values only, in the order of the fields."""
        changed = {
            key: value
            for key, value in options.model_dump().items()
            if value != type(options).model_fields[key].default
        }
        return " ".join(f"{key}={value}" for key, value in changed.items()) or "default"


def switches_label(options: Options) -> str:
    """Label of options that are switches only: "none", "all", or those that are on."""
    switches = options.model_dump()
    on = [name for name, value in switches.items() if value]
    return "all" if len(on) == len(switches) else "+".join(on) or "none"


AnyKnob = Knob[Any]
