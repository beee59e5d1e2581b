"""From overrides to configurations: the one place that calls Hydra.

It uses Hydra's loader and nothing that is global, so other Hydra applications and threads do not
meet it. Hydra takes 80 ms for a point, and a search looks at thousands: a point that differs from
what was composed by plain values and options alone is put together here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from packaging.version import Version

from openpi_opt.config import SCHEMAS, Config
from openpi_opt.errors import UserError
from openpi_opt.paths import conf_dir, user_conf_dir
from openpi_opt.preset import check_name, resolve_auto
from openpi_opt.space.errors import user_errors
from openpi_opt.space.files import PRESETS, Folder, PresetFolder, preset_parents, read
from openpi_opt.space.settings import Settings
from openpi_opt.space.space import head, parse_override

_CONTROL = (*Settings.model_fields, "provenance", "hydra")
_SCALARS = (str, int, float, bool, type(None))
# Text that Hydra resolves or refuses.
_SPECIAL = ("${", "???")
_HYDRA = threading.RLock()
_MOST_SECTIONS = 20_000  # kept as they were put together


@dataclass(frozen=True)
class Composed:
    """What Hydra composes from some overrides. `values` are the sections and settings as plain
    data, `choices` the option of each group, `written` the groups that a preset sets key by key.
    `linked` says that a value is taken from another one."""

    values: dict[str, Any]
    choices: dict[str, str]
    written: frozenset[str]
    linked: bool


class Composer:
    """Composes `conf/sweep.yaml` with overrides. Threads may share one."""

    def __init__(
        self,
        preset_dir: Path | None = None,
        config_dir: Path | None = None,
        name: str = "sweep",
        conf: Path | None = None,
    ):
        """Look for options in the project's `conf/`, then in `preset_dir` (presets), then in
        `config_dir` and `conf/` of the working folder. Raises UserError: a folder that was named
        does not exist."""
        for given in (preset_dir, config_dir):
            if given is not None and not given.is_dir():
                raise UserError(f"folder {given} does not exist. Name the one that has the files.")
        own = conf or conf_dir()
        others = [config_dir, user_conf_dir()] if conf is None else []
        self.roots = [own]
        for folder in others:
            if folder is not None and folder.is_dir() and not folder.samefile(own):
                self.roots.append(folder.absolute())
        self._preset_dir = preset_dir and preset_dir.absolute()
        self._name = name
        path = ConfigSearchPathImpl()
        path.append("hydra", "pkg://hydra.conf")
        path.append("main", f"{Folder.scheme()}://{own}")
        if self._preset_dir is not None:
            path.append("--preset-dir", f"{PresetFolder.scheme()}://{self._preset_dir}")
        for root in self.roots[1:]:
            path.append("user", f"{Folder.scheme()}://{root}")
        path.append("schema", "structured://")
        with _hydra():
            Plugins.instance()  # registers the sources of Hydra's own
            for source in (Folder, PresetFolder):
                SourcesRegistry.instance().register(source)
            self.loader = ConfigLoaderImpl(path)
        self._bases: dict[tuple[str, ...], Composed | UserError] = {}
        self._options: dict[tuple[str, str], dict[str, Any] | None] = {}
        self._sections: dict[tuple[Any, ...], dict[str, Any] | None] = {}

    def __call__(self, overrides: Sequence[str]) -> Config:
        """The configuration for these overrides. Raises UserError: unknown group, option or key; a
        value that no schema admits."""
        values = self.assembled(overrides)
        return trial_config(self.compose(overrides).values if values is None else values)

    def settings(self, overrides: Sequence[str]) -> dict[str, Any]:
        """What the overrides that steer a sweep say; the others may still lack values."""
        lines = [line for line in overrides if head(parse_override(line)) in Settings.model_fields]
        single = [line for line in lines if not parse_override(line).is_sweep_override()]
        values = self._load(single, only=tuple(Settings.model_fields)).values
        return {name: values[name] for name in Settings.model_fields if name in values}

    def options(self, group: str) -> list[str]:
        """The options of a group, of all folders."""
        with _hydra():
            return list(self.loader.get_group_options(group, ObjectType.CONFIG))

    def compose(self, overrides: Sequence[str]) -> Composed:
        """All of it by Hydra. Raises UserError: as for a call; or one file would silently win over
        another, or over what the command line says."""
        return self._load(overrides)

    def _load(self, overrides: Sequence[str], only: Sequence[str] = ()) -> Composed:
        for line in overrides:
            if head(parse_override(line)) == "hydra":
                raise UserError(f"{line}: Hydra's own settings have no effect here. Leave it out.")
        # `NamedSpace.join` reads these points: Hydra would add them to the file's.
        lines = [line for line in overrides if parse_override(line).key_or_group != "space.start"]
        with _hydra(), user_errors():
            composed = self.loader.load_configuration(self._name, lines, RunMode.RUN)
            choices = {
                str(group): str(option)
                for group, option in composed.hydra.runtime.choices.items()
                if option is not None and not str(group).startswith("hydra")
            }
            written = self._check_files(overrides, choices)
            raw = OmegaConf.to_container(composed, resolve=False)
            assert isinstance(raw, dict)
            linked = "${" in repr({key: value for key, value in raw.items() if key != "hydra"})
            names = [str(k) for k in composed if k != "hydra" and (not only or k in only)]
            values = {name: _plain(composed[name]) for name in names}
        return Composed(values, choices, written, linked)

    def _check_files(self, overrides: Sequence[str], choices: Mapping[str, str]) -> frozenset[str]:
        """Refuse where one file would silently win; returns the groups that a preset writes."""
        named = {parse_override(line).key_or_group: line for line in overrides}
        written: set[str] = set()
        for group, option in choices.items():
            files = self._files(group, option)
            if len({file.read_bytes() for file in files}) > 1:
                both = " and ".join(map(str, files))
                raise UserError(
                    f"{group}={option} is two different files: {both}.\nRename one of them."
                )
            for file in preset_parents(read(files[0])) if group == PRESETS and files else ():
                for key in file.body:
                    if key in choices and key in named:
                        raise UserError(
                            f"{named[key]} cannot replace what {group}={option} says: {file.path} "
                            f"sets keys of {key} one by one.\nName the keys ({key}.KEY=VALUE) "
                            "instead of the option, or take them out of the file."
                        )
                written |= file.body.keys()
        return frozenset(written)

    def _files(self, group: str, option: str) -> list[Path]:
        folders = [root / group for root in self.roots]
        if group == PRESETS and self._preset_dir is not None:
            folders.append(self._preset_dir)
        return [path for folder in folders if (path := folder / f"{option}.yaml").is_file()]

    def assembled(self, overrides: Sequence[str]) -> dict[str, Any] | None:
        """The sections and settings without Hydra, or None where only Hydra can tell."""
        lines: dict[str | None, list[str]] = {}
        for line in overrides:
            lines.setdefault(_section(line), []).append(line)
        shared = tuple(lines.pop(None, ()))
        base = self._base(shared)
        if base is None:
            return None
        values = dict(base.values)
        for name, own in lines.items():
            # Of thousands of points most share a section. Nobody changes what is kept here.
            key = (shared, str(name), *own)
            if key in self._sections:
                section = self._sections[key]
            else:
                section = self._put_together(base, str(name), own)
                if len(self._sections) >= _MOST_SECTIONS:
                    self._sections.clear()
                self._sections[key] = section
            if section is None:
                return None
            values[str(name)] = section
        return values

    def _put_together(
        self, base: Composed, name: str, lines: Sequence[str]
    ) -> dict[str, Any] | None:
        """A section with the overrides that belong to it, or None where only Hydra can tell."""
        own = [parse_override(line) for line in lines]
        choices = [override for override in own if override.key_or_group == name]
        if len(choices) > 1:
            return None
        section = self._chosen(base, choices[0]) if choices else base.values[name]
        for override in own:
            if section is not None and override.key_or_group != name:
                section = _with_key(section, override)
        return section

    def _base(self, shared: tuple[str, ...]) -> Composed | None:
        """What the overrides that belong to no section give, or None where that is not of use."""
        with _HYDRA:
            if shared not in self._bases:
                try:
                    self._bases[shared] = self._load(shared)
                except UserError as error:  # the whole may be right where this part is not
                    self._bases[shared] = error
            base = self._bases[shared]
        return None if isinstance(base, UserError) or base.linked else base

    def _chosen(self, base: Composed, override: Override) -> dict[str, Any] | None:
        """The content of an option, if it is all that there is to the section."""
        group, option = override.key_or_group, override.value()
        if override.type is not OverrideType.CHANGE or not isinstance(option, str):
            return None
        if group in base.written:
            return None
        before = self._option(group, base.choices.get(group, ""))
        if before is None or before != base.values.get(group):
            return None
        return self._option(group, option)

    def _option(self, group: str, option: str) -> dict[str, Any] | None:
        """The content of an option's file, if it is the only one of its name and plain data."""
        if (group, option) not in self._options:
            files = self._files(group, option)
            found = read(files[0]) if len(files) == 1 else None
            plain = found is not None and not found.defaults and found.package is None
            if found is None or not plain or any(mark in repr(found.body) for mark in _SPECIAL):
                self._options[group, option] = None
            else:
                self._options[group, option] = found.body
        return self._options[group, option]


def compose(
    overrides: Sequence[str], preset: str | None = None, preset_dir: Path | None = None
) -> Config:
    """A configuration outside of a sweep: with a preset, its model and workload unless overridden.
    An override of one of their keys changes that key and nothing else. Raises UserError: unknown
    preset, group, option or key, or a value that no schema admits."""
    chosen = [*overrides]
    if preset is not None:
        check_name(preset)
        chosen.insert(0, f"preset={preset}")
    chosen = resolve_auto(chosen, preset_dir)
    with _HYDRA:  # the grammar's parser has no lock of its own
        values = Composer(preset_dir).compose(chosen).values
        keys = [parse_override(line).key_or_group.split(".") for line in overrides]
    provenance = values.get("provenance") or {}
    for section in ("model", "workload"):
        named = [key for key in keys if key[0] == section]
        if section in provenance and [section] not in named:
            given = {key[1] for key in named}
            kept = {k: v for k, v in provenance[section].items() if k not in given}
            values[section] = kept | {k: v for k, v in values[section].items() if k in given}
    return trial_config(values)


def trial_config(values: Mapping[str, Any]) -> Config:
    """The trial's part of what was composed, validated. Raises UserError: unknown key, or a value
    that no schema admits."""
    return Config.parse({key: value for key, value in values.items() if key not in _CONTROL})


@contextmanager
def _hydra() -> Iterator[None]:
    """One thread at a time, under our own compatibility level of Hydra; others' stay theirs."""
    with _HYDRA:
        base = VersionBase.instance()
        before, base.version_base = base.version_base, Version("1.3")
        try:
            yield
        finally:
            base.version_base = before


def _plain(value: Any) -> Any:
    if not isinstance(value, DictConfig) and not OmegaConf.is_config(value):
        return value
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)


@lru_cache(maxsize=4096)
def _section(line: str) -> str | None:
    """The section or knob that an override changes, or None if it is not one alone."""
    override = parse_override(line)
    name = head(override)
    return name if name in SCHEMAS and override.package is None else None


def _with_key(values: Any, override: Override) -> dict[str, Any] | None:
    """A copy of `values` with one key changed (`a.b=1`, `a.b=[x,y]`) or added (`+a.b=1`); None when
    it is not plain."""
    value = override.value()
    parts = value if isinstance(value, list) else [value]
    special = any(mark in part for part in parts if isinstance(part, str) for mark in _SPECIAL)
    scalars = all(isinstance(part, _SCALARS) for part in parts)
    if not isinstance(values, dict) or special or not scalars or "[" in override.key_or_group:
        return None
    *path, last = override.key_or_group.split(".")[1:]
    changed = node = dict(values)
    for name in path:
        if not isinstance(node.get(name), dict):
            return None
        node[name] = node = dict(node[name])
    same = isinstance(node.get(last), list) == isinstance(value, list)
    plain = last in node and same and not isinstance(node[last], dict)
    fits = {OverrideType.CHANGE: plain, OverrideType.ADD: last not in node}
    if override.type is None or not fits.get(override.type):
        return None
    node[last] = value
    return changed
