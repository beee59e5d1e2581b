"""Errors of Hydra and OmegaConf as one to three lines that say what to do.

Hydra's messages are made for programmers (search paths, struct flags, `+key` to append). The
texts that are matched here are those of Hydra 1.3, which is pinned; what does not match is shown
as Hydra said it, on one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import yaml
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from openpi_opt.config import SECTIONS
from openpi_opt.errors import UserError
from openpi_opt.knobs import BY_NAME
from openpi_opt.space.settings import Settings


@contextmanager
def hydra_errors() -> Iterator[None]:
    """Turn what Hydra raises into UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name} line {mark.line + 1}" if mark else "a configuration file"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where} is not YAML: {problem}. Mend that line.") from error
    except ValueError as error:
        if not str(error).startswith("Config group override"):
            raise
        raise UserError(
            "a group takes the name of one of its options, nothing else "
            f"(python -m openpi_opt.sweep --help lists them): {error}."
        ) from error


def explain(error: Exception) -> str:
    """What to tell the user."""
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OmegaConfBaseException):
        return _omegaconf(error)
    if not str(error).strip() and isinstance(error.__cause__, OmegaConfBaseException):
        return _omegaconf(error.__cause__)
    return _composition(error)


def known_keys() -> list[str]:
    """Groups and settings that a command line may name."""
    return [*BY_NAME, *SECTIONS, "preset", *Settings.model_fields]


def _missing_option(error: MissingConfigException) -> str:
    missing = error.missing_cfg_file or "sweep"
    group, _, option = missing.rpartition("/")
    if not group:
        return f"no configuration called {missing}: leave out --config-name, or give --config-dir."
    origin = re.match(r"In '(.+?)': ", str(error))
    asked = f" (asked for by {origin[1]})" if origin and "/" in origin[1] else ""
    options = sorted(error.options or [])
    if not options:
        hint = " python -m openpi_opt.promote STUDY --name NAME makes one." * (group == "preset")
        return f"{group}={option}{asked}: the group {group} has no options.{hint}"
    return (
        f"{group}={option}{asked}: no such option. {group} has {', '.join(options)}."
        f"{_near(option, options, prefix=f'{group}=')}"
    )


def _composition(error: Exception) -> str:
    text = str(error)
    could_not = re.search(r"Could not override '([^']+)'", text)
    if could_not:
        origin = re.match(r"In '(.+?)': ", text)
        return _unknown_key(could_not[1], origin[1] if origin else None)
    merging = re.search(r"Error merging override (.+)", text)
    if merging:
        detail = _one_line(str(error.__cause__ or "")).partition(" full_key")[0]
        return f"{merging[1]} does not fit: {detail or 'wrong type'}."
    twice = re.search(r"(\S+) appears more than once|Multiple values for ([^.\s]+)", text)
    if twice and twice.lastindex:
        name = twice[twice.lastindex]
        return f"{name} is chosen twice. Write {name}=OPTION, without a +."
    return _one_line(text).partition(" Config search path:")[0]


def _unknown_key(key: str, origin: str | None) -> str:
    where = f"{origin}: " if origin else ""
    head, _, rest = key.partition(".")
    if rest and (fields := _fields(head)):
        return (
            f"{where}unknown key {key}; {head} has {', '.join(fields)}."
            f"{_near(rest, fields, prefix=f'{head}.')}"
        )
    known = known_keys()
    if rest and head in known:
        return f"{where}unknown key {key}; {head} has no {rest} (--cfg job shows all keys)."
    if head == "hydra":
        return f"{where}unknown key {key}; python -m openpi_opt.sweep --hydra-help lists Hydra's."
    return f"{where}unknown group or key {head}; known are {', '.join(known)}.{_near(head, known)}"


def _fields(head: str) -> list[str]:
    if head in SECTIONS:
        return list(SECTIONS[head].model_fields)
    return list(BY_NAME[head].options_type.model_fields) if head in BY_NAME else []


def _omegaconf(error: OmegaConfBaseException) -> str:
    key = error.full_key
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value and needs one. Add {key}=VALUE."
    where = f"{key}: " if key else ""
    if isinstance(error, (InterpolationKeyError, InterpolationResolutionError)):
        return f"{where}{_first_line(error)}.\nName a key that exists between ${{ and }}."
    return f"{where}{_first_line(error)}."


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _near(word: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {prefix}{close[0]}?" if close else ""
