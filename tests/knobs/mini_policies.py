"""The options of every knob, and mini configurations for a CPU to run them in."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from openpi_opt import runtime
from openpi_opt.config import Config
from openpi_opt.machine import Machine, TorchBuild
from openpi_opt.pi0.config import MODELS, Pi0Config
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.ops import Visibility
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.precision import cast
from openpi_opt.pi0.workload import make_inputs

CONF = Path(__file__).parents[2] / "conf"
CPU = Machine((), TorchBuild("2.13.0", None, None), "test cpu", cores=2, memory_mib=8000)
# A masked camera before a valid one, and padding: nothing is right by being first.
MASKED = {"active_cameras": [False, True], "prompt_slots": 6, "prompt_tokens": 4}
SMALL = {"horizon": 3, "steps": 2, "batch_size": 1}


def options(knob: str) -> dict[str, dict[str, Any]]:
    """The options of a knob by name, as the files of its group hold them."""
    files = sorted((CONF / knob).glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


def config(workload: dict[str, Any] | None = None, **knobs: dict[str, Any]) -> Config:
    """pi0_mini on the CPU in float32, unless `knobs` (or `model=`) say otherwise."""
    return Config.parse(
        {
            "model": {"name": "pi0_mini"},
            "platform": {"device": "cpu"},
            "workload": {**SMALL, **(MASKED if workload is None else workload)},
            "precision": {"dtype": "float32"},
            **knobs,
        }
    )


PI05: dict[str, Any] = {"model": {"name": "pi05_mini"}}


@cache
def _built(model: Pi0Config, name: str, steps: int) -> Pi0Policy:
    cfg = config({**MASKED, "steps": steps}, model={"name": name})
    return runtime.build_policy(cfg, torch.device("cpu"))


def _plain(name: str, steps: int) -> Pi0Policy:
    return _built(MODELS[name], name, steps)  # a test may have given it fewer layers


def plain_policy(cfg: Config) -> Pi0Policy:
    """A copy of the plain float32 policy of `cfg`."""
    return copy.deepcopy(_plain(cfg.model.name, cfg.workload.steps))


def prepare(cfg: Config) -> runtime.Prepared:
    """The policy of `cfg` with its knobs applied."""
    return runtime.apply_knobs(plain_policy(cfg), cfg)


def sample_inputs(cfg: Config, seed: int = 0) -> Inputs:
    """A seeded batch of the workload of `cfg`."""
    policy = _plain(cfg.model.name, cfg.workload.steps)
    return make_inputs(runtime.workload_of(cfg), policy.config, seed, "cpu")


def plain_actions(cfg: Config, inputs: Inputs, dtype: str = "float32") -> Tensor:
    """What the plain eager policy of a precision answers."""
    policy = plain_policy(cfg)
    cast(policy, getattr(torch, dtype))
    with torch.no_grad():
        return policy.sample_actions(inputs)


def attention_calls(
    prepared: runtime.Prepared, stage: str, inputs: Inputs, seen: Callable[..., Any]
) -> list[Any]:
    """What `seen` makes of q, k, v, visibility and scale of each attention of a stage in a call."""
    attend, found = getattr(prepared.policy.ops, f"attention_{stage}"), []

    def spied(*given: Any) -> Tensor:
        found.append(seen(*given))
        return attend(*given)

    setattr(prepared.policy.ops, f"attention_{stage}", spied)
    prepared.call(inputs)
    return found


def sizes(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scale: float) -> tuple[Any, ...]:
    """Queries, keys, whether there is no mask, and the segments."""
    return q.shape[1], k.shape[1], visibility.mask is None, visibility.segments
