"""Presets: a promoted configuration as a Hydra file, with its provenance.

A preset names an option of each group where the promoted knobs equal one, so that a group on the
command line replaces it as usual. Nothing reads `provenance` to choose an implementation.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.knobs import KNOBS
from openpi_opt.knobs.base import AnyKnob, Options
from openpi_opt.paths import conf_dir, user_conf_dir
from openpi_opt.result import write_atomic
from openpi_opt.space.files import read

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> None:
    """Raise UserError for a name that is not a plain file name."""
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 64 else name[:40] + "..."
        raise UserError(
            f"preset name {shown!r}: use letters, digits, '.', '_' and '-', starting with a letter "
            "or digit, at most 64 characters."
        )


def preset_path(name: str, folder: Path | None) -> Path:
    """Where the preset called `name` is written: `folder`, or `conf/preset` of the working folder.
    Raises UserError: a name that could leave the folder."""
    check_name(name)
    return (folder or user_conf_dir() / "preset") / f"{name}.yaml"


def check_free(path: Path) -> None:
    """Raise UserError where there is a preset already."""
    if path.exists():
        raise UserError(f"preset {path} exists. Choose another --name, or --force to replace it.")


def write(path: Path, cfg: Config, provenance: dict[str, Any], replace: bool = False) -> None:
    """Write the preset, whole or not at all, and never over another unless `replace`. Raises
    UserError: there is a preset of this name, or the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_atomic(path, render(cfg, provenance), replace)
        except FileExistsError:
            raise UserError(
                f"preset {path} was written by another promotion meanwhile, and is left as it is."
                "\nWhat was measured is kept: the same command with another --name, or --force, "
                "takes no new process."
            ) from None
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. Choose another --preset-dir."
        ) from error


def render(cfg: Config, provenance: dict[str, Any]) -> str:
    """The YAML text of a preset."""
    defaults: list[Any] = []
    body: dict[str, Any] = {}
    for knob in KNOBS:
        chosen = cfg.canonical().knobs[knob.name]
        option = option_of(knob, chosen)
        if option is None:
            body[knob.name] = chosen.model_dump(mode="json")
        else:
            defaults.append({f"override /{knob.name}": option})
    document = {"defaults": defaults, **body, "provenance": provenance}
    head = (
        f"# @package _global_\n# Written by `python -m openpi_opt.promote {provenance['study']}`.\n"
    )
    return head + yaml.safe_dump(document, sort_keys=False, width=100, allow_unicode=True)


def option_of(knob: AnyKnob, chosen: Options) -> str | None:
    """The option file of a knob that says exactly `chosen`; keys it leaves out are defaults."""
    for file in sorted((conf_dir() / knob.name).glob("*.yaml")):
        if knob.options_type.model_validate(read(file).body) == chosen:
            return file.stem
    return None
