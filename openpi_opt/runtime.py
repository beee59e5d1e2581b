"""From a configuration to a callable policy: the same way for a trial and for `load_policy`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openpi_opt.knobs import KNOBS
from openpi_opt.knobs.base import Configuration
from openpi_opt.pi0 import checkpoint, weights
from openpi_opt.pi0.config import MODELS
from openpi_opt.pi0.policy import Pi0Policy
from openpi_opt.pi0.workload import Workload
from openpi_opt.vendor import BY_DEVICE

if TYPE_CHECKING:
    from openpi_opt.config import Config
    from openpi_opt.pi0.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A policy with all knobs applied. `call` is what is measured and deployed; `uncaptured` is the
    same without graph replay, in which stages can be told apart."""

    policy: Pi0Policy
    call: Callable[[Inputs], Tensor]
    uncaptured: Callable[[Inputs], Tensor]


def torch_device(cfg: Config) -> torch.device:
    """ROCm devices are called cuda in torch. The trial sees one GPU only, so its index is 0."""
    return torch.device(BY_DEVICE[cfg.device].torch_device)


def workload_of(cfg: Configuration) -> Workload:
    """The policy's view of the workload section."""
    given = cfg.workload
    return Workload(
        active_cameras=given.active_cameras,
        prompt_slots=given.prompt_slots,
        prompt_tokens=given.prompt_tokens,
        horizon=given.horizon,
        steps=given.steps,
        batch_size=given.batch_size,
        flexible=given.layout == "flexible",
    )


def build_policy(cfg: Config, device: torch.device) -> Pi0Policy:
    """The plain float32 policy with its weights. Raises openpi_opt.pi0.checkpoint.CheckpointError:
    the checkpoint does not fit the model."""
    config = dataclasses.replace(MODELS[cfg.model.name], rope_frequencies=cfg.rope_frequencies())
    policy = weights.build(config, device, steps=cfg.workload.steps)
    if cfg.weights.path is not None:
        checkpoint.load(policy, Path(cfg.weights.path))
    else:
        weights.init_random(policy, cfg.weights.seed)
    return policy


def apply_knobs(policy: Pi0Policy, cfg: Config) -> Prepared:
    """Configure, fold, transform and wrap, over the knobs that act, in their order. `policy` is as
    `build_policy` made it. What is folded after a cast would be rounded twice, and differently from
    a run that had no reason to cast."""
    if type(policy) is not Pi0Policy or policy.dtype != torch.float32:
        raise ValueError("knobs are applied to a plain float32 policy, once")
    acting = [knob for knob in KNOBS if knob.acts(cfg)]
    for knob in acting:
        knob.configure(cfg)
    for knob in acting:
        knob.fold(policy, cfg)
    for knob in acting:
        knob.transform(policy, cfg)
    # Not inference_mode: its tensors have other dispatch keys than those a caller brings, and
    # compiled stages would be compiled once more for each mixture of the two.
    uncaptured: Callable[[Inputs], Tensor] = torch.no_grad()(policy.sample_actions)
    call = uncaptured
    for knob in acting:
        call = knob.wrap(call, cfg)
    return Prepared(policy, call if call is uncaptured else torch.no_grad()(call), uncaptured)
