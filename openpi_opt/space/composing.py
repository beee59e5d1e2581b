"""From what Hydra composed to a configuration, with the checks that Hydra does not make."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from openpi_opt.compose import CONTROL_KEYS, trial_config
from openpi_opt.config import SECTIONS, Config
from openpi_opt.errors import UserError
from openpi_opt.knobs import BY_NAME
from openpi_opt.space.assemble import Assembler, Composed
from openpi_opt.space.hydra_errors import hydra_errors
from openpi_opt.space.settings import Settings
from openpi_opt.space.space import parse_override

# Groups that steer the sweep; every other one beside sections and knobs is a preset's kind.
_SETTING_GROUPS = ("space", "executor")
_GLOBAL = re.compile(r"^#\s*@package\s+_global_\s*$", re.MULTILINE)


class SweepCompose:
    """Composes one point of a sweep through Hydra's config loader, or as that would do."""

    def __init__(self, loader: ConfigLoader, master: DictConfig):
        self._loader = loader
        self._master = master
        self._assemble = Assembler(self.by_hydra)

    def __call__(self, overrides: list[str]) -> Config:
        """The configuration for these overrides.

        Raises:
            UserError: unknown group, option or key; a value that no schema admits.
        """
        assembled = self._assemble(overrides)
        return self.by_hydra(overrides).config if assembled is None else assembled

    def by_hydra(self, overrides: list[str]) -> Composed:
        """All of it by Hydra.

        Raises:
            UserError: as for a call.
        """
        with hydra_errors():
            composed = self._loader.load_sweep_config(self._master, overrides)
        runtime = composed.hydra.runtime
        check_sources(runtime, overrides)
        values, choices, roots = plain(composed), _choices(runtime), _roots(runtime)
        written = {
            key
            for group, option in choices.items()
            for path in _files(roots, group, option)[:1]
            for key in _global_keys(path)
        }
        return Composed(
            trial_config(values), values, choices, written, tuple(roots), _is_linked(composed)
        )


def plain(composed: DictConfig, lenient: bool = False) -> dict[str, Any]:
    """The composed values without Hydra's own, interpolations resolved.

    `lenient` takes the sweep's settings only: in a sweep the rest may still lack values.

    Raises:
        UserError: a mandatory value is missing, or an interpolation leads nowhere.
    """
    names = [str(key) for key in composed if key != "hydra"]
    if lenient:
        names = [name for name in names if name in Settings.model_fields]
    with hydra_errors():
        return {name: _plain_value(composed[name]) for name in names}


def _is_linked(composed: DictConfig) -> bool:
    """Whether a value of the composed sections is an interpolation."""
    raw = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(raw, dict)
    return "${" in repr({key: value for key, value in raw.items() if key != "hydra"})


def _plain_value(value: Any) -> Any:
    if not OmegaConf.is_config(value):
        return value
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)


def check_sources(runtime: Any, overrides: Sequence[str]) -> None:
    """Refuse where Hydra would let one file win over what the user sees or says.

    Raises:
        UserError: two different files are the same option, or the body of a preset would win over
            a group that the command line chooses.
    """
    roots, choices = _roots(runtime), _choices(runtime)
    files = {group: _files(roots, group, option) for group, option in choices.items()}
    for group, found in files.items():
        if len({path.read_bytes() for path in found}) > 1:
            raise UserError(
                f"{group}={choices[group]} is two different files: "
                f"{' and '.join(map(str, found))}.\nRename one of them."
            )
    named = {parse_override(line).key_or_group: line for line in overrides}
    on_command_line = {group: named[group] for group in choices if group in named}
    for group, found in files.items():
        for path in found[:1]:
            if group not in SECTIONS and group not in BY_NAME and group not in _SETTING_GROUPS:
                _check_keys(f"{group}={choices[group]}", path)
            _check_body(f"{group}={choices[group]}", path, on_command_line)


def _roots(runtime: Any) -> list[Path]:
    return [Path(s.path) for s in runtime.config_sources if s.schema == "file"]


def _choices(runtime: Any) -> dict[str, str]:
    return {
        str(group): str(option)
        for group, option in runtime.choices.items()
        if option is not None and not str(group).startswith("hydra")
    }


def _files(roots: Sequence[Path], group: str, option: str) -> list[Path]:
    return [path for root in roots if (path := root / group / f"{option}.yaml").is_file()]


def _check_keys(name: str, path: Path) -> None:
    """A preset reaches over all groups, so it must say so, and name existing ones."""
    text = path.read_text(encoding="utf-8")
    if not _GLOBAL.search(text):
        raise UserError(
            f"{name}: {path} lacks the line `# @package _global_` at its top, without which "
            "nothing in it has an effect. Add it."
        )
    known = [*SECTIONS, *BY_NAME, *CONTROL_KEYS, "defaults"]
    for key in yaml.safe_load(text) or {}:
        if key not in known:
            raise UserError(
                f"{name}: {path} has the unknown key {key!r}; known are {', '.join(known)}."
            )


def _check_body(name: str, path: Path, on_command_line: Mapping[str, str]) -> None:
    """A global body is merged after the groups, so its keys would silently win."""
    for part in _with_parents(path):
        for key in _body_keys(part):
            if key in on_command_line:
                raise UserError(
                    f"{on_command_line[key]} cannot replace what {name} says: {part} sets keys of "
                    f"{key} one by one.\nName the keys ({key}.KEY=VALUE) instead of the option, "
                    "or take them out of the file."
                )


def _global_keys(path: Path) -> set[str]:
    return {key for part in _with_parents(path) for key in _body_keys(part)}


def _body_keys(path: Path) -> list[str]:
    """The keys that a file sets in other groups."""
    text = path.read_text(encoding="utf-8")
    body = yaml.safe_load(text) if _GLOBAL.search(text) else None
    return list(body) if isinstance(body, dict) else []


def _with_parents(path: Path) -> Iterator[Path]:
    """The file, and those of its folder that its defaults list names."""
    yield path
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    for entry in (document or {}).get("defaults") or []:
        if not isinstance(entry, str):  # `override /group: option` names no file of this folder
            continue
        other = path.with_name(f"{entry}.yaml")
        if other != path and other.is_file():
            yield from _with_parents(other)
