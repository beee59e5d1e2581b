"""Configurations are data: none may name code to run, leave its folder, or read the environment.

Hydra makes objects of what `hydra.callbacks` and the logging sections name, and copies variables
into configurations that get recorded, so a preset from elsewhere could run code or carry a token
into MLflow. What was composed is looked at before Hydra acts on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf

from openpi_opt.errors import UserError
from openpi_opt.paths import conf_dir

# What Hydra needs to start this project's own sweeper; the launcher is never used.
_OWN_TARGETS = {
    "hydra.sweeper._target_": "hydra_plugins.openpi_opt_sweeper.OpenpiOptSweeper",
    "hydra.launcher._target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
}
_TARGET_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
_LOGGING = {"version": 1, "root": {"level": "ERROR"}, "disable_existing_loggers": True}
# With these Hydra runs code, sets variables or writes files, and this is what they hold here.
_INERT: dict[str, Any] = {
    "callbacks": {},
    "hydra_logging": _LOGGING,
    "job_logging": _LOGGING,
    "job.env_copy": [],
    "job.env_set": {},
    "run": {"dir": "."},
    "sweep": {"dir": ".", "subdir": "."},
    "output_subdir": None,
}
# Variables that `${oc.env:NAME}` may read: they say where things are.
_PLACES = re.compile(r"HOME|USER|PWD|TMPDIR|SCRATCH|WORK|[A-Z0-9_]+_(DIR|PATH|HOME|ROOT)")
# Groups of the project's own folder in which users write as well.
_WRITTEN = ("preset", "space")
# A part of an option's name: `a`, `a.b`, `a=b` and so on, but no way out of its folder.
_PART = re.compile(r"[^\W.][\w.+=,@ -]*")
_LONGEST = 200


@contextmanager
def watched() -> Iterator[None]:
    """While this holds, everything that Hydra composes in this process passes `check` first."""
    real = ConfigLoaderImpl.load_configuration

    def load_configuration(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> DictConfig:
        composed = real(self, *args, **kwargs)
        check(composed)
        return composed

    ConfigLoaderImpl.load_configuration = load_configuration  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = real  # type: ignore[method-assign]


def check(composed: DictConfig) -> None:
    """Refuse a configuration that is more than data.

    Raises:
        UserError: names the key.
    """
    plain = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(plain, dict)
    for path, value in _leaves(plain, ""):
        key = path.rpartition(".")[2]
        if key in _TARGET_KEYS and _OWN_TARGETS.get(path) != value:
            raise UserError(
                f"{path}={value}: a configuration is data and names no code to run.\nTake "
                f"{key} out; what can be chosen is in --help."
            )
        if isinstance(value, str) and "oc.env" in value:
            _check_variables(path, value)
    own = plain.get("hydra") or {}
    for name, inert in _INERT.items():
        section = own
        for part in name.split("."):
            section = section.get(part) or {}
        if section and section != inert:
            raise UserError(
                f"hydra.{name}: a configuration is data; by this Hydra would run code, set "
                "variables or write files.\nTake it out."
            )
    runtime = own.get("runtime") or {}
    roots = [Path(s["path"]) for s in runtime.get("config_sources") or () if s["schema"] == "file"]
    for group, option in (runtime.get("choices") or {}).items():
        if option is not None and not str(group).startswith("hydra/"):
            check_option(str(group), str(option))
            for root in roots:
                if root != conf_dir() or group in _WRITTEN:
                    _check_parents(root / str(group) / f"{option}.yaml")


def check_option(group: str, option: str) -> None:
    """Refuse the name of an option that could be a file outside of its group's folder.

    Raises:
        UserError: names it.
    """
    if len(option) <= _LONGEST and all(_PART.fullmatch(part) for part in option.split("/")):
        return
    shown = option if len(option) <= _LONGEST else option[:40] + "..."
    raise UserError(
        f"{group}={shown!r} is not the name of an option: it names a file in the folder {group}/, "
        "with letters, digits and . _ - + = , alone.\nPresets of another folder: --preset-dir DIR."
    )


def _check_variables(path: str, text: str) -> None:
    names = re.findall(r"oc\.env:\s*([A-Za-z0-9_]+)\s*[,}]", text)
    if len(names) == text.count("oc.env") and all(_PLACES.fullmatch(name) for name in names):
        return
    raise UserError(
        f"{path}={text}: what a configuration says is recorded, so it reads no variable but those "
        "that say where things are (HOME, USER, *_DIR, *_PATH, *_HOME, *_ROOT).\n"
        "Write the value itself."
    )


def _check_parents(path: Path, seen: tuple[Path, ...] = ()) -> None:
    """Refuse a file whose defaults list takes in one from outside of its folder."""
    if path in seen or not path.is_file():
        return
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    entries = document.get("defaults") if isinstance(document, dict) else None
    for entry in entries or ():
        if isinstance(entry, str):  # `override /group: option` is among the choices
            check_option(path.parent.name, entry)
            _check_parents(path.with_name(f"{entry}.yaml"), (*seen, path))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every key of nested mappings and lists with its dotted path, and its value."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            inner = f"{path}.{key}" if path else str(key)
            yield inner, part
            yield from _leaves(part, inner)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield f"{path}.{number}", part
            yield from _leaves(part, f"{path}.{number}")
