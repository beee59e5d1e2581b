"""Normalisation by the statistics of the training data, as openpi and LeRobot keep them.

openpi: `assets/<asset_id>/norm_stats.json`; mean and standard deviation for pi0, quantiles for
pi05. LeRobot: `policy_preprocessor.json`, which says the mode, and safetensors beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from openpi_opt.checkpoint_file import Family
from openpi_opt.errors import UserError

Floats: TypeAlias = NDArray[np.float64]
_FILE = "norm_stats.json"
_OPENPI_EPS, _LEROBOT_EPS = 1e-6, 1e-8


class Scale(NamedTuple):
    """(x - offset) / scale + shift, and back; [n] each. Vectors that are longer keep their other
    dimensions; shorter ones use the first statistics."""

    offset: Floats
    scale: Floats
    shift: float

    def normalised(self, x: Floats) -> Floats:
        """[..., m] -> the same shape."""
        return self._on(x, lambda part, offset, scale: (part - offset) / scale + self.shift)

    def restored(self, y: Floats) -> Floats:
        """[..., m], normalised -> the same shape in the data's units."""
        return self._on(y, lambda part, offset, scale: (part - self.shift) * scale + offset)

    def _on(self, x: Floats, function: Any) -> Floats:
        known = min(len(self.offset), x.shape[-1])
        out = np.array(x, np.float64)
        out[..., :known] = function(out[..., :known], self.offset[:known], self.scale[:known])
        return out


class Statistics(NamedTuple):
    """How the state is normalised and how actions are brought back; `origin` is the file."""

    state: Scale
    actions: Scale
    origin: Path


def load(folder: Path, asset_id: str | None, family: Family) -> Statistics:
    """The statistics in a checkpoint's folder. Raises UserError: there are none (or several, none
    of which `asset_id` names), or they are not what the family needs."""
    if (folder / "policy_preprocessor.json").is_file():
        return _lerobot(folder)
    file = _openpi_file(folder, asset_id)
    return read_openpi(file, family)


def read_openpi(file: Path, family: Family) -> Statistics:
    """openpi's file; by quantiles unless the family is pi0, whose files have none. Raises
    UserError: a file that is damaged, or lacks what is needed."""
    content = _json(file)
    try:
        entries = content["norm_stats"]
        state, actions = (_openpi_scale(entries[key], family) for key in ("state", "actions"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} lacks what a {family} policy needs: {error}. It holds, below norm_stats, mean "
            "and std (and q01, q99 for pi05) of state and actions."
        ) from error
    return Statistics(state, actions, file)


def _openpi_scale(entry: Mapping[str, Any], family: Family) -> Scale:
    if family == "pi0":
        return Scale(_vector(entry, "mean"), _vector(entry, "std") + _OPENPI_EPS, 0.0)
    low, high = _vector(entry, "q01"), _vector(entry, "q99")
    return Scale(low, (high - low + _OPENPI_EPS) / 2.0, -1.0)


def _vector(entry: Mapping[str, Any], key: str) -> Floats:
    vector = np.asarray(entry[key], np.float64)
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise ValueError(f"{key} is no list of finite numbers")
    return vector


def _openpi_file(folder: Path, asset_id: str | None) -> Path:
    assets = folder / "assets"
    if asset_id is not None and (assets / asset_id / _FILE).is_file():
        return assets / asset_id / _FILE
    found = sorted(assets.rglob(_FILE))
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(file.parent.relative_to(assets)) for file in found) or "none"
    raise UserError(
        f"{folder} has no statistics assets/{asset_id or '<asset_id>'}/{_FILE} (there: {names}). "
        "Give norm_stats=FILE, or asset_id in a YAML of the robot."
    )


def _lerobot(folder: Path) -> Statistics:
    """Statistics of LeRobot's normaliser step, by the modes that it names."""
    file = folder / "policy_preprocessor.json"
    steps = _json(file).get("steps", [])
    step = next((s for s in steps if s.get("registry_name") == "normalizer_processor"), None)
    if step is None or "state_file" not in step:
        raise UserError(f"{file} has no normalizer_processor with a state_file.")
    modes, tensors = step.get("config", {}).get("norm_map", {}), folder / step["state_file"]
    try:
        values = load_file(tensors)
        state = _lerobot_scale(values, "observation.state", modes.get("STATE", "IDENTITY"), True)
        actions = _lerobot_scale(values, "action", modes.get("ACTION", "IDENTITY"), False)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{tensors} does not hold the statistics of {file}: {error}") from error
    return Statistics(state, actions, tensors)


def _lerobot_scale(
    values: Mapping[str, NDArray[Any]], key: str, mode: str, forwards: bool
) -> Scale:
    vectors = {name.rpartition(".")[2]: v for name, v in values.items() if name.startswith(key)}
    if mode == "IDENTITY":
        return Scale(np.zeros(0), np.ones(0), 0.0)
    if mode == "MEAN_STD":
        deviation = _vector(vectors, "std") + (_LEROBOT_EPS if forwards else 0.0)
        return Scale(_vector(vectors, "mean"), deviation, 0.0)
    names = {"QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90"), "MIN_MAX": ("min", "max")}
    if mode not in names:
        raise ValueError(f"the normalisation {mode} is not known")
    low, high = (_vector(vectors, name) for name in names[mode])
    spread = np.where(high == low, _LEROBOT_EPS, high - low)
    return Scale(low, spread / 2.0, -1.0)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object.")
    return content
