"""Compose a configuration outside of Hydra's command line, for `load_policy` and `promote`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from openpi_opt import data_only
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.paths import conf_dir, user_conf_dir
from openpi_opt.preset import check_name, config_root

# Keys of conf/sweep.yaml that steer the sweep and are no part of a trial's configuration.
CONTROL_KEYS = (
    "study",
    "store",
    "n_trials",
    "minutes",
    "sampler",
    "seed",
    "baseline",
    "fresh",
    "devices",
    "pruning",
    "objective",
    "dry_run",
    "space",
    "executor",
    "storage",
    "provenance",
    "hydra",
)


def trial_config(composed: Mapping[str, Any]) -> Config:
    """The trial's part of a composed mapping, validated."""
    return Config.parse({k: v for k, v in composed.items() if k not in CONTROL_KEYS})


def compose(
    overrides: list[str], preset: str | None = None, preset_dir: Path | None = None
) -> Config:
    """Compose `conf/sweep.yaml` with a preset and overrides.

    Model and workload are those of the preset's provenance unless an override names them.

    Raises:
        UserError: unknown preset, group, option or key, or a value that no schema admits.
    """
    chosen = list(overrides)
    if preset is not None:
        check_name(preset)
        chosen.insert(0, f"preset={preset}")
    try:
        with (
            _search_path(preset_dir) as search,
            initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"),
        ):
            composed = hydra_compose("sweep", [*search, *chosen], return_hydra_config=True)
            data_only.check(composed)
            own = [str(key) for key in composed if key != "hydra"]
            composed = OmegaConf.masked_copy(composed, own)
            plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        first = " ".join(str(error).split())
        raise UserError(f"cannot compose {' '.join(chosen) or 'the defaults'}: {first}") from error
    assert isinstance(plain, dict)
    raw = {str(key): value for key, value in plain.items()}
    provenance = raw.get("provenance") or {}
    for section in ("model", "workload"):
        if section in provenance and not any(o.startswith(section) for o in overrides):
            raw[section] = provenance[section]
    return trial_config(raw)


@contextmanager
def _search_path(preset_dir: Path | None) -> Iterator[list[str]]:
    """Where presets are looked for besides the project's own: the given and the working folder."""
    with ExitStack() as stack:
        roots = [user_conf_dir()]
        if preset_dir is not None:
            roots.insert(0, stack.enter_context(config_root(preset_dir)))
        found = [f"file://{root}" for root in roots if root.is_dir() and root != conf_dir()]
        yield [f"hydra.searchpath=[{','.join(found)}]"] if found else []
