"""Use a preset in code: `openpi_opt.load_policy`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpi_opt import checkpoint_file, runtime
from openpi_opt.config import Config, Weights
from openpi_opt.errors import UserError
from openpi_opt.guarding import verify as guarding
from openpi_opt.guest import as_measured
from openpi_opt.knobs import KNOBS
from openpi_opt.machine import Machine, probe
from openpi_opt.observation import Array, Observation, to_inputs
from openpi_opt.pi0.config import MODELS
from openpi_opt.pi0.inputs import Inputs
from openpi_opt.pi0.workload import make_inputs
from openpi_opt.preset import resolve_auto, warn
from openpi_opt.process.environment import CACHES, knob_variables
from openpi_opt.robot.spec import load as load_robot
from openpi_opt.robot.statistics import load as load_statistics
from openpi_opt.robot.statistics import read_openpi
from openpi_opt.robot.tokenizer import Tokenizer
from openpi_opt.robot.transform import Transforms
from openpi_opt.space.compose import compose

_LOG = logging.getLogger(__name__)


class ReadyPolicy:
    """A policy with a configuration's optimisations applied; made by `load_policy`. Threads may
    share it: calls take turns, and no call sees another's inputs."""

    def __init__(
        self,
        prepared: runtime.Prepared,
        cfg: Config,
        load_seconds: float = 0.0,
        transforms: Transforms | None = None,
    ):
        self.config = cfg
        self.load_seconds = load_seconds
        self.transforms = transforms
        self.first_answer_seconds: float | None = None
        self._prepared = prepared
        self._workload = runtime.workload_of(cfg)

    def sample_actions(self, observation: Observation, noise: Array | None = None) -> Tensor:
        """Normalised actions [B, H, A] float32 on the policy's device.

        The first call compiles and captures; `warm_up` does it before the robot waits. `noise`
        [B, H, A] makes the call repeatable; None draws it. The caller's default dtype and device,
        autocast and inference mode have no effect.

        Raises ValueError: names the field that is not what the policy takes
        (`Observation`).
        """
        with as_measured():
            return self.call(self.upload(observation, noise))

    def infer(self, obs: Mapping[str, Any], noise: Array | None = None) -> dict[str, Any]:
        """A robot's raw observation -> `actions` [H, n] float32 in its units, and `policy_timing`.

        The observation is what openpi's policy of this robot takes (`conf/robot`). Timing in
        milliseconds: `transform_ms` both ways, `upload_ms`, `model_ms`, `download_ms` and, as
        openpi calls what its own reports, `infer_ms`, the model's.

        Raises:
            UserError: the policy was loaded without a robot, or for batches.
            ValueError: names the key of the observation that is not what the robot sends.
        """
        if self.transforms is None or self._workload.batch_size != 1:
            raise UserError(
                "infer takes one observation of a robot: load_policy(..., robot='libero', "
                "tokenizer=FILE) with workload.batch_size=1."
            )
        times = [time.perf_counter()]

        def lap() -> None:
            if self._prepared.policy.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        observation, state = self.transforms.observation(obs)
        lap()
        with as_measured():
            inputs = self.upload(observation, noise)
            lap()
            actions = self.call(inputs)
            lap()
            normalised = actions[0].double().cpu().numpy()
            lap()
        robot_actions = self.transforms.actions(normalised, state)
        if not np.isfinite(robot_actions).all():
            raise ValueError("the actions are not finite; none are given to the robot")
        lap()
        before, upload, model, download, after = (1e3 * float(d) for d in np.diff(times))
        timing = {"infer_ms": model, "model_ms": model, "transform_ms": before + after}
        timing |= {"upload_ms": upload, "download_ms": download}
        return {"actions": robot_actions, "policy_timing": timing}

    def upload(self, observation: Observation, noise: Array | None = None) -> Inputs:
        """The checked inputs on the policy's device; inside of `guest.as_measured`."""
        policy = self._prepared.policy
        return to_inputs(
            observation, noise, policy.config, self._workload, policy.layout, policy.device
        )

    def call(self, inputs: Inputs) -> Tensor:
        """Actions [B, H, A] of uploaded inputs; inside of `guest.as_measured`."""
        return self._prepared.call(inputs)

    def warm_up(self) -> float:
        """Compile and capture with a random observation -> the seconds that it took. Calling it
        again takes one inference. `first_answer_seconds` keeps the first time."""
        with as_measured():
            start = time.perf_counter()
            policy = self._prepared.policy
            inputs = make_inputs(self._workload, policy.config, 0, policy.device)
            self.call(inputs).cpu()
            seconds = time.perf_counter() - start
        if self.first_answer_seconds is None:
            self.first_answer_seconds = seconds
        return seconds


# The one call of a program that deploys: nine arguments, of which it gives two or three.
def load_policy(
    preset: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
    preset_dir: str | os.PathLike[str] | None = None,
    robot: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    norm_stats: str | os.PathLike[str] | None = None,
    verify: bool = True,
    store: str | os.PathLike[str] | None = None,
) -> ReadyPolicy:
    """A ready policy with the knobs of `preset`, on this machine.

    Compilers keep what they made in `~/.cache/openpi_opt` (or where TORCHINDUCTOR_CACHE_DIR and
    TRITON_CACHE_DIR say), so that the next process starts faster.

    Args:
        preset: name of a preset; None is the baseline, the plain eager policy. `auto` takes the
            fastest promoted one for this GPU and the model and workload of `overrides`, and says
            which. A machine other than the preset's is warned of (`UserWarning`).
        checkpoint: openpi or LeRobot safetensors, file or folder; None takes seeded random
            weights, which are for measuring only.
        overrides: Hydra overrides like those of `sweep`, for instance `["workload=openpi"]`.
            Model and workload are those with which the preset was promoted unless given here;
            with a checkpoint the model is the one that it holds.
        preset_dir: folder of the preset, when promoted with `--preset-dir`.
        robot: name in `conf/robot`, or a YAML file, of whom `infer` takes raw observations.
        tokenizer: PaliGemma's SentencePiece file, for its prompts.
        norm_stats: openpi's norm_stats.json, where it is not in the checkpoint's `assets`.
        verify: ask the guard before the policy is handed out. What passed is remembered in
            `store`, so that only the first load of a combination on a machine takes longer.
        store: a sweep's store; None is `~/.cache/openpi_opt`.

    Raises UserError: unknown preset or override, unusable checkpoint, an option that this
    machine lacks, an environment variable that had to be set before the process started, or a
    policy whose actions are wrong.
    """
    start, machine = time.perf_counter(), probe()
    cfg = _configuration(preset, checkpoint, overrides, preset_dir, machine)
    transforms = _transforms(robot, tokenizer, norm_stats, cfg)
    for name, folder in CACHES.items():
        os.environ.setdefault(name, str(Path("~/.cache/openpi_opt").expanduser() / folder))
    device = runtime.torch_device(cfg)
    references = Path(store or "~/.cache/openpi_opt").expanduser() / "references"
    with as_measured():
        unknown = verify and not guarding.passed_before(cfg, machine, references)
        asked = guarding.ask_first(cfg, machine, references) if unknown else None
        prepared = runtime.apply_knobs(runtime.build_policy(cfg, device), cfg)
        if asked is not None:
            guarding.ask_policy(asked, prepared, machine)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return ReadyPolicy(prepared, cfg, time.perf_counter() - start, transforms)


def _configuration(
    preset: str | None,
    checkpoint: str | os.PathLike[str] | None,
    overrides: Sequence[str],
    preset_dir: str | os.PathLike[str] | None,
    machine: Machine,
) -> Config:
    """What was asked for, resolved and admitted by every knob; see `load_policy`."""
    where = Path(preset_dir) if preset_dir else None
    if preset is not None:  # `auto` becomes a name
        preset = resolve_auto([f"preset={preset}", *overrides], where)[0].removeprefix("preset=")
    cfg = compose(list(overrides), preset, where)
    if checkpoint is not None:
        cfg = _with_checkpoint(cfg, os.fspath(checkpoint), overrides)
    cfg = cfg.resolved(machine)
    for knob in KNOBS:
        refusal = knob.check(cfg, machine)
        if refusal is not None:
            raise UserError(f"preset {preset or 'baseline'} is {refusal.outcome}: {refusal.reason}")
    if preset is not None:
        warn(preset, where, machine, cfg.platform)
    _require_environment(cfg)
    return cfg


def _with_checkpoint(cfg: Config, checkpoint: str, overrides: Sequence[str]) -> Config:
    """The configuration with these weights, the model that they are, and its rotary frequencies."""
    path = checkpoint_file.inspect(checkpoint)
    weights = Weights(kind="checkpoint", path=path)
    update: dict[str, str] = {"name": _model(path)}
    named = {word.partition("=")[0].lstrip("+") for word in overrides}
    trained, asked = checkpoint_file.horizon(path), cfg.workload.horizon
    if trained not in (None, asked) and "workload.horizon" not in named:
        raise UserError(
            f"{path} was trained to give {trained} actions at once, and workload "
            f"{cfg.workload.name} asks for {asked}: workload.horizon={trained} takes the "
            f"checkpoint's, workload.horizon={asked} insists."
        )
    if "model.rope_frequencies" not in named:
        update["rope_frequencies"] = checkpoint_file.rope_frequencies(path)
    model = cfg.model.model_copy(update=update)
    _LOG.info("%s: %s, rope_frequencies %s", path, model.name, model.rope_frequencies)
    return cfg.model_copy(update={"weights": weights, "model": model})


def _transforms(
    robot: str | None,
    tokenizer: str | os.PathLike[str] | None,
    norm_stats: str | os.PathLike[str] | None,
    cfg: Config,
) -> Transforms | None:
    """What `infer` needs, or None without a robot."""
    if robot is None:
        if tokenizer is not None or norm_stats is not None:
            raise UserError("tokenizer and norm_stats belong to a robot: give robot= as well.")
        return None
    spec, family = load_robot(robot), cfg.model.family
    if tokenizer is None:
        raise UserError(
            f"robot={robot} needs tokenizer=FILE: PaliGemma's SentencePiece model, which openpi "
            "downloads from gs://big_vision/paligemma_tokenizer.model."
        )
    if norm_stats is not None:
        statistics = read_openpi(Path(norm_stats), family)
    elif cfg.weights.path is not None:
        path = Path(cfg.weights.path)
        statistics = load_statistics(path if path.is_dir() else path.parent, spec.asset_id, family)
    else:
        raise UserError(f"robot={robot} needs a checkpoint with statistics, or norm_stats=FILE.")
    action_dim = MODELS[cfg.model.name].action_dim
    return Transforms(spec, family, statistics, Tokenizer(os.fspath(tokenizer)), action_dim)


def _model(path: str) -> str:
    """The model that a checkpoint holds; the small ones are told by the width of their expert."""
    name: str = checkpoint_file.family(path)
    width = checkpoint_file.shape(path, "action_in_proj.weight")[0]
    return f"{name}_mini" if width == MODELS[f"{name}_mini"].expert.width else name


def _require_environment(cfg: Config) -> None:
    wanted = knob_variables(cfg)
    missing = {k: v for k, v in wanted.items() if os.environ.get(k) != v}
    if missing:
        text = " ".join(f"{name}={value}" for name, value in missing.items())
        raise UserError(
            f"this configuration needs {text} in the environment before Python starts; "
            "set it and start again."
        )
