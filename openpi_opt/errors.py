"""The two errors with a meaning of their own, and texts without the passwords in them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, Literal

_IN_URL = re.compile(r"(?<=://)[^/\s'\"]*@")
# As much as can be: a password may have been pasted with any character in it.
_CREDENTIALS = re.compile(r"://.*@", re.DOTALL)
_QUERY = re.compile(r"(://[^?]*)\?.*", re.DOTALL)
_IN_QUERY = re.compile(r"\b(password|passwd|pwd|token|secret|api_?key)=[^&\s'\"]+", re.IGNORECASE)


def masked(text: str) -> str:
    """A text without the users, passwords and tokens in its URLs: for messages and records."""
    return _IN_QUERY.sub(r"\1=***", _IN_URL.sub("***@", text))


def hidden(word: str) -> str:
    """A word of a command line without the credentials and the query of a URL in it. `masked` is
    for sentences; here all that is in the word may be password."""
    return _QUERY.sub(r"\1?...", _CREDENTIALS.sub("://...@", word))


def near(word: object, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message: what comes nearest to a word; empty where nothing does."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {prefix}{close[0]}?" if close and close[0] != word else ""


def first_reason(error: Any) -> str:
    """What the first finding of a pydantic `ValidationError` says."""
    return str(error.errors()[0]["msg"]).removeprefix("Value error, ")


class UserError(Exception):
    """A request that cannot be carried out as given. The message has one to three lines: what was
    given, what is allowed, what to do. Every verb prints it without a traceback and exits with code
    2."""


class RefusedError(Exception):
    """Raised in a trial when something that could not be seen from outside turns out missing. The
    trial ends with `outcome`; nothing else is run in its place."""

    def __init__(self, outcome: Literal["unavailable", "invalid"], reason: str):
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
