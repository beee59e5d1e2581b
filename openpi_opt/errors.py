"""Errors with a meaning of their own: a user's to mend, or a configuration refused."""

from __future__ import annotations

from typing import Literal


class UserError(Exception):
    """A request that cannot be carried out as given.

    The message has one to three lines: what was given, what is allowed, what to do. Every verb
    prints it without a traceback and exits with code 2.
    """


class RefusedError(Exception):
    """Raised in a trial when something that could not be seen from outside turns out missing.

    The trial ends with `outcome`; nothing else is run in its place.
    """

    def __init__(self, outcome: Literal["unavailable", "invalid"], reason: str):
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
