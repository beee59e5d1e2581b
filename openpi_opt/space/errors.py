"""What Hydra refuses, as one to three lines that say what to do.

Two errors are what users meet: an option that does not exist, and a key that does not. The texts
matched here are those of Hydra 1.3, which is pinned; what does not match is shown on one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from openpi_opt.config import unknown_key
from openpi_opt.errors import UserError, near
from openpi_opt.space.settings import Settings


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into UserError."""
    try:
        yield
    except MissingConfigException as error:
        raise UserError(_missing_option(error)) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "sweep").rpartition("/")
    if not group:
        return f"no configuration called {option}: leave out --config-name, or give --config-dir."
    origin = re.match(r"In '(.+?)': ", str(error))
    asked = f" (asked for by {origin[1]})" if origin and "/" in origin[1] else ""
    options = sorted(error.options or [])
    if not options:
        hint = " python -m openpi_opt.promote STUDY --name NAME makes one." * (group == "preset")
        return f"{group}={option}{asked}: the group {group} has no options.{hint}"
    hint = near(option, options, f"{group}=")
    return f"{group}={option}{asked}: no such option. {group} has {', '.join(options)}.{hint}"


def _explain(error: Exception) -> str:
    """What to tell the user."""
    cause = error.__cause__
    if not str(error).strip() and isinstance(cause, OmegaConfBaseException):
        error = cause
    text = " ".join(str(error).split())
    could_not = re.search(r"Could not override '([^']+)'", text)
    if could_not:
        origin = re.match(r"In '(.+?)': ", text)
        said = unknown_key(could_not[1], ("preset", *Settings.model_fields))
        return f"{origin[1]}: {said}" if origin else said
    twice = re.search(r"(\S+) appears more than once|Multiple values for ([^.\s]+)", text)
    if twice and twice.lastindex:
        name = twice[twice.lastindex]
        return f"{name} is chosen twice. Write {name}=OPTION, without a +."
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value and needs one. Add {error.full_key}=VALUE."
    if isinstance(error, OmegaConfBaseException):
        where = f"{error.full_key}: " if error.full_key else ""
        return f"{where}{str(error).splitlines()[0].rstrip('.')}."
    detail = " ".join(str(cause).split()).partition(" full_key")[0] if cause else ""
    return f"{text.partition(' Config search path:')[0]}{f' ({detail})' if detail else ''}"
