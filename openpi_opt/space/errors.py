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

from openpi_opt.config import SECTIONS
from openpi_opt.errors import UserError, near
from openpi_opt.knobs import BY_NAME
from openpi_opt.space.schema_keys import is_free, paths
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


def known_keys() -> list[str]:
    """Groups and settings that a command line may name."""
    return [*BY_NAME, *SECTIONS, "preset", *Settings.model_fields]


def unknown_key(key: str, origin: str = "") -> str:
    """What to say of a key that no schema has: what there is, and what comes nearest."""
    head, _, rest = key.partition(".")
    if head not in known_keys():
        hint = near(head, known_keys())
        return f"{origin}unknown group or key {head}; known are {', '.join(known_keys())}.{hint}"
    known = paths(head)
    if is_free(key.rpartition(".")[0]):
        return f"{origin}{key} is not set, so it is added: +{key}=VALUE."
    fields = list(dict.fromkeys(path.split(".")[1] for path in known))
    what = f"{head} has {', '.join(fields)}." if fields else f"{head} has no {rest}."
    same_name = [path for path in known if path.split(".")[-1] == key.split(".")[-1]]
    hint = f" Did you mean {same_name[0]}?" if same_name else near(key, known)
    return f"{origin}unknown key {key}; {what}{hint}"


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
        return unknown_key(could_not[1], f"{origin[1]}: " if origin else "")
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
