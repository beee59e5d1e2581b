"""Use a preset in code: `openpi_opt.load_policy`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from openpi_opt import checkpoint_file, runtime
from openpi_opt.config import Config, Weights
from openpi_opt.errors import UserError
from openpi_opt.knobs import KNOBS
from openpi_opt.machine import probe
from openpi_opt.observation import Observation, to_inputs
from openpi_opt.process.environment import knob_variables
from openpi_opt.space.compose import compose


class ReadyPolicy:
    """A policy with a configuration's optimisations applied; made by `load_policy`."""

    def __init__(self, prepared: runtime.Prepared, cfg: Config):
        self.config = cfg
        self._prepared = prepared
        self._workload = runtime.workload_of(cfg)

    def sample_actions(self, observation: Observation, noise: Tensor | None = None) -> Tensor:
        """Normalised actions [B, H, A] float32 on the policy's device.

        The first call compiles and captures; make one before the robot waits for it. `noise`
        [B, H, A] makes the call repeatable; None draws it.

        Raises:
            ValueError: shapes or masks other than the workload's.
        """
        policy = self._prepared.policy
        inputs = to_inputs(
            observation, noise, policy.config, self._workload, policy.layout, policy.device
        )
        return self._prepared.call(inputs)


def load_policy(
    preset: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
    preset_dir: str | os.PathLike[str] | None = None,
) -> ReadyPolicy:
    """A ready policy with the knobs of `preset`, on this machine.

    Args:
        preset: name of a preset; None is the baseline, the plain eager policy.
        checkpoint: openpi or LeRobot safetensors, file or folder; None takes seeded random
            weights, which are for measuring only.
        overrides: Hydra overrides like those of `sweep`, for instance `["workload=openpi"]`.
            Model and workload are those with which the preset was promoted unless given here;
            with a checkpoint the model is the full one that it holds, `pi0` or `pi05`.
        preset_dir: folder of the preset, when promoted with `--preset-dir`.

    Raises:
        UserError: unknown preset or override, unusable checkpoint, an option that this machine
            lacks, or an environment variable that had to be set before the process started.
    """
    cfg = compose(
        list(overrides), preset=preset, preset_dir=Path(preset_dir) if preset_dir else None
    )
    if checkpoint is not None:
        path = checkpoint_file.inspect(os.fspath(checkpoint))
        weights = Weights(kind="checkpoint", path=path)
        model = cfg.model.model_copy(update={"name": checkpoint_file.family(path)})
        cfg = cfg.model_copy(update={"weights": weights, "model": model})
    machine = probe()
    cfg = cfg.resolved(machine)
    for knob in KNOBS:
        refusal = knob.check(cfg, machine)
        if refusal is not None:
            raise UserError(f"preset {preset or 'baseline'} is {refusal.outcome}: {refusal.reason}")
    _require_environment(cfg)
    device = runtime.torch_device(cfg)
    return ReadyPolicy(runtime.apply_knobs(runtime.build_policy(cfg, device), cfg), cfg)


def _require_environment(cfg: Config) -> None:
    wanted = knob_variables(cfg)
    missing = {k: v for k, v in wanted.items() if os.environ.get(k) != v}
    if missing:
        text = " ".join(f"{name}={value}" for name, value in missing.items())
        raise UserError(
            f"this configuration needs {text} in the environment before Python starts; "
            "set it and start again."
        )
