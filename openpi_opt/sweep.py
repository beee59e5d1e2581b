"""Try configurations, one process each: `python -m openpi_opt.sweep -m attention=aiter,sdpa`.

The command line is Hydra's, with flags of our own. With `-m`, or a named space, several values of
a key are a sweep; without, it is one trial.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from openpi_opt.cli import CONTINUED, run
from openpi_opt.errors import UserError
from openpi_opt.figures import LIMITS, OBJECTIVES
from openpi_opt.knobs import BY_NAME
from openpi_opt.paths import conf_dir
from openpi_opt.preset import resolve_auto
from openpi_opt.space.compose import Composer
from openpi_opt.space.errors import user_errors
from openpi_opt.space.files import check_option, check_variables
from openpi_opt.space.settings import Settings
from openpi_opt.space.space import Space, parse_override

if TYPE_CHECKING:
    from openpi_opt.api import Study

DRY_RUN_LIMIT = 50
# Hydra's verbs that run nothing.
_SHOWING = ("help", "hydra_help", "cfg", "info", "shell_completion")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when at least one trial was ok, else 1."""
    words = sys.argv[1:] if argv is None else [*argv]
    if any(word.startswith("experiment=") for word in words):
        from openpi_opt import experiment  # tables and plots: not for every start

        return experiment.run(words, sweep)
    return sweep(words)


def sweep(words: Sequence[str]) -> int:
    """The command line without experiments."""
    own, rest = _own_flags(words)
    arguments = get_args_parser().parse_intermixed_args(rest)  # -m may stand behind overrides
    overrides = [spelled_out(word) for word in arguments.overrides]
    arguments.overrides = resolve_auto(overrides, own.preset_dir)
    if arguments.help or arguments.hydra_help:
        return _show(arguments, own)
    if not arguments.shell_completion:
        _check(arguments)
    if any(getattr(arguments, verb) for verb in _SHOWING):
        return _show(arguments, own)
    return _run(arguments, own, words)


def _run(arguments: Namespace, own: Namespace, words: Sequence[str]) -> int:
    from openpi_opt.engine.command import run_command_line

    overrides = arguments.overrides
    composer = _composer(arguments, own)
    values = composer.settings(overrides)
    if own.dry_run:
        values["dry_run"] = DRY_RUN_LIMIT if own.limit is None else own.limit
    values |= {name: True for name in ("fresh", "keep_source") if getattr(own, name)}
    swept = arguments.multirun or _names_space(overrides)
    if swept:
        space = Settings.parse(values).space.join(overrides, composer.options)
    else:
        space = Space.parse(overrides)
    return run_command_line(overrides, values, space, composer, swept, words)


def _own_flags(words: Sequence[str]) -> tuple[Namespace, list[str]]:
    """Our own flags, and the rest; Hydra's parser knows its own only."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset-dir", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--keep-source", action="store_true")
    own, rest = parser.parse_known_args(words)
    if own.limit is not None and not own.dry_run:
        raise UserError("--limit says how many configurations --dry-run lists. Add --dry-run.")
    return own, rest


def spelled_out(word: str) -> str:
    """A word of the command line, with the key that `devices=` or `objective=` is short for.

    `devices=[0,1]` and `devices=all` name GPUs, `objective=[latency,memory]` and
    `objective=latency` say what to minimise. Hydra puts no list in the place of a group.
    """
    key, _, value = word.partition("=")
    if key == "devices" and (value == "all" or value.startswith("[")):
        return f"devices.gpus={value}"
    if key == "objective" and (value.startswith("[") or value.isidentifier()):
        return f"objective.minimize=[{value.strip('[]')}]"
    return word


def _composer(arguments: Namespace, own: Namespace) -> Composer:
    if arguments.config_path is not None:
        raise UserError(
            "--config-path: the project has its own conf/. Use --config-dir to add one."
        )
    folder = arguments.config_dir and Path(arguments.config_dir)
    return Composer(own.preset_dir, folder, arguments.config_name or "sweep")


def _show(arguments: Namespace, own: Namespace) -> int:
    """Hydra's verbs that print something."""
    from hydra._internal.hydra import Hydra

    # What `--help` says of these is what the registries have.
    for kind, known in (("objectives", OBJECTIVES), ("limits", LIMITS), ("knobs", BY_NAME)):
        text = ", ".join(known)
        OmegaConf.register_new_resolver(f"openpi_opt.{kind}", lambda text=text: text, replace=True)
    composer = _composer(arguments, own)
    hydra = Hydra("sweep", composer.loader)
    name, overrides = arguments.config_name or "sweep", arguments.overrides
    with user_errors():
        if arguments.help or arguments.hydra_help:
            show = hydra.app_help if arguments.help else hydra.hydra_help
            show(config_name=name, args_parser=get_args_parser(), args=arguments)
        elif arguments.cfg:
            composer.compose(overrides)  # refuses what would be refused
            shown = arguments.cfg, arguments.package, arguments.resolve
            hydra.show_cfg(name, overrides, *shown)
        elif arguments.info:
            hydra.show_info(arguments.info, name, overrides)
        else:
            hydra.shell_completion(name, overrides)
    return 0


def _names_space(overrides: Sequence[str]) -> bool:
    """Whether a named space is chosen: it sweeps, so it needs no -m."""
    read = [parse_override(line) for line in overrides]
    return any(o.key_or_group == "space" and o.value() not in ("none", None) for o in read)


def _check(arguments: Namespace) -> None:
    """Say what is wrong with the command line before Hydra says it at length. Raises UserError: bad
    syntax, a sweep without -m, or a flag that does not fit here."""
    if arguments.experimental_rerun is not None:
        raise UserError(
            "--experimental-rerun reads pickles, which can run anything. "
            "Use preset=NAME, or the overrides of the earlier command."
        )
    verbs = ("run", "multirun", "cfg", "info")
    given = [f"--{verb}" for verb in verbs if getattr(arguments, verb)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude one another. Leave out all but one.")
    sweeps = arguments.multirun or _names_space(arguments.overrides)
    for line in arguments.overrides:
        override = parse_override(line)
        if "oc.env" in line:
            check_variables(override.key_or_group, line)
        is_group = (conf_dir() / override.key_or_group).is_dir() and not override.is_delete()
        if is_group and isinstance(override.value(), str):
            check_option(override.key_or_group, str(override.value()))
        if is_group and isinstance(override.value(), (int, float, bool, type(None))):
            raise UserError(
                f"{line}: {override.key_or_group} is a group and takes the name of an option "
                "(--help lists them), or group.key=value for a single key."
            )
        if override.is_sweep_override() and not sweeps:
            raise UserError(
                f"{line}: several values are a sweep. Add -m to try them all, or give one value; "
                f"for one value with a comma in it, quote it: \"{line.partition('=')[0]}='a,b'\"."
            )


class _Callable(ModuleType):
    """This module is also the function `openpi_opt.sweep(...)`: both have that name."""

    def __call__(self, *arguments: Any, **more: Any) -> Study:
        """Run a sweep from Python: see `api.sweep`."""
        from openpi_opt import api

        return api.sweep(*arguments, **more)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    run(main, CONTINUED)
