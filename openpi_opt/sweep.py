"""Try configurations, one process each: `python -m openpi_opt.sweep -m attention=aiter,sdpa`.

Hydra reads the command line; with `-m` its sweeper plugin hands over to `search.study`, without
it the task function does so with one point.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from openpi_opt.cli import CONTINUED, run
from openpi_opt.data_only import check_option, watched
from openpi_opt.errors import UserError
from openpi_opt.figures import LIMITS, OBJECTIVES
from openpi_opt.paths import conf_dir, user_conf_dir
from openpi_opt.preset import config_root

if TYPE_CHECKING:
    from openpi_opt.config import Config

DRY_RUN_LIMIT = 50
_OWN_PLUGINS = ("hydra/sweeper", "hydra/launcher")
# What Hydra composed for one trial, from which files, and the overrides.
_COMPOSED: list[tuple[DictConfig, Any, list[str]]] = []


class UserConf(SearchPathPlugin):
    """Adds `conf/` of the working folder, where `promote` writes presets, and `--preset-dir`.

    Registered by `main` and not found by discovery: other Hydra programs of this environment are
    not to be changed.
    """

    preset_root: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Put them behind the project's own folder."""
        if self.preset_root is not None:
            search_path.append("--preset-dir", f"file://{self.preset_root}")
        folder = user_conf_dir()
        if folder.is_dir() and not (conf_dir().is_dir() and folder.samefile(conf_dir())):
            search_path.append("working folder", f"file://{folder}")


def _register_help() -> None:
    """What `--help` says of objectives and limits is what `figures` has."""
    for name, known in (("objectives", OBJECTIVES), ("limits", LIMITS)):
        text = ", ".join(known)
        OmegaConf.register_new_resolver(f"openpi_opt.{name}", lambda text=text: text, replace=True)


def main() -> int:
    """Run the command line; 0 when at least one trial was ok, else 1.

    Raises:
        UserError: bad input.
        SystemExit: the same codes, when Hydra is between.
    """
    if any(word.startswith("experiment=") for word in sys.argv[1:]):
        from openpi_opt import experiment  # tables and plots: not for every start

        return experiment.run(sys.argv[1:], _sweep)
    return _sweep()


def _sweep() -> int:
    """The command line without experiments."""
    _register_help()
    with ExitStack() as stack:
        own = _take_own_flags()
        if own.preset_dir is not None:
            UserConf.preset_root = stack.enter_context(config_root(own.preset_dir))
        if own.dry_run:
            limit = DRY_RUN_LIMIT if own.limit is None else own.limit
            sys.argv.append(f"dry_run={limit}")
        elif own.limit is not None:
            raise UserError("--limit says how many configurations --dry-run lists. Add --dry-run.")
        return _main()


def _take_own_flags() -> Namespace:
    """Take our own flags off the command line; Hydra's parser knows its own options only.

    `--dry-run` becomes the key `dry_run`, which the sweeper sees, and `--fresh` the key `fresh`.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset-dir", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--fresh", action="store_true")
    own, rest = parser.parse_known_args()
    sys.argv[1:] = [_objective(_devices(word)) for word in rest]
    if own.fresh:
        sys.argv.append("fresh=true")
    return own


def _devices(word: str) -> str:
    """`devices=[0,1]` and `devices=all` name GPUs; Hydra puts no list in the place of a group."""
    key, _, value = word.partition("=")
    if key != "devices" or not (value == "all" or value.startswith("[")):
        return word
    return f"devices.gpus={value}"


def _objective(word: str) -> str:
    """`objective=[latency,memory]` and `objective=latency` say what to minimise, as `devices`."""
    key, _, value = word.partition("=")
    if key != "objective" or not (value.startswith("[") or value.isidentifier()):
        return word
    return f"objective.minimize=[{value.strip('[]')}]"


def _main() -> int:
    arguments = get_args_parser().parse_args()
    # Hydra then lets exceptions through instead of printing its own kind of report.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    Plugins.instance().register(UserConf)
    if not arguments.help:
        if _is_run(arguments) and _names_space(arguments.overrides):
            sys.argv.append("--multirun")
            arguments.multirun = True
        _check(arguments)
    from openpi_opt.space.hydra_errors import hydra_errors

    with hydra_errors(), watched():
        _hydra_main()
    return _run_single(*_COMPOSED.pop()) if _COMPOSED else 0


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="sweep")
def _hydra_main(composed: DictConfig) -> None:
    """Without `-m`: keep what was composed. Run in here, errors would get Hydra's report."""
    own = HydraConfig.get()
    overrides = OmegaConf.to_container(own.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    _COMPOSED.append((composed, own.runtime, overrides))


def _run_single(composed: DictConfig, runtime: Any, overrides: list[str]) -> int:
    """One trial."""
    from openpi_opt.compose import trial_config
    from openpi_opt.engine.command import run_command_line
    from openpi_opt.space.composing import check_sources, plain
    from openpi_opt.space.space import Space

    check_sources(runtime, overrides)
    values = plain(composed)
    space = Space.parse(overrides)

    def compose(_: list[str]) -> Config:
        return trial_config(values)

    return run_command_line(overrides, values, space, compose, swept=False)


def _is_run(arguments: Namespace) -> bool:
    """Whether one trial is asked for, by no other of Hydra's verbs."""
    verbs = ("multirun", "cfg", "info", "shell_completion", "hydra_help")
    return not any(getattr(arguments, verb) for verb in verbs)


def _names_space(overrides: list[str]) -> bool:
    """Whether a named space is chosen: it sweeps, so it needs no -m."""
    from openpi_opt.space.space import parse_override

    read = [parse_override(line) for line in overrides]
    return any(o.key_or_group == "space" and o.value() not in ("none", None) for o in read)


def _check(arguments: Namespace) -> None:
    """Say what is wrong with the command line before Hydra says it at length.

    Raises:
        UserError: bad syntax, a sweep without -m, or a flag that does not fit here.
    """
    from openpi_opt.space.space import parse_override

    if arguments.experimental_rerun is not None:
        raise UserError(
            "--experimental-rerun reads pickles, which can run anything. "
            "Use preset=NAME, or the overrides of the earlier command."
        )
    verbs = ("run", "multirun", "cfg", "info", "shell_completion")
    given = [f"--{verb}" for verb in verbs if getattr(arguments, verb)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude one another. Leave out all but one.")
    for line in [] if arguments.shell_completion else arguments.overrides:
        override = parse_override(line)
        if override.key_or_group in _OWN_PLUGINS:
            raise UserError(f"{line}: this command brings its own sweeper. Leave it out.")
        is_group = (conf_dir() / override.key_or_group).is_dir() and not override.is_delete()
        if is_group and isinstance(override.value(), str):
            check_option(override.key_or_group, str(override.value()))
        if is_group and isinstance(override.value(), (int, float, bool, type(None))):
            raise UserError(
                f"{line}: {override.key_or_group} is a group and takes the name of an option "
                "(--help lists them), or group.key=value for a single key."
            )
        if override.is_sweep_override() and not arguments.multirun:
            raise UserError(
                f"{line}: several values are a sweep. Add -m to try them all, or give one value; "
                f"for one value with a comma in it, quote it: \"{line.partition('=')[0]}='a,b'\"."
            )


if __name__ == "__main__":
    run(main, CONTINUED)
