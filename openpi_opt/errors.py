"""The one kind of error that is a user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """A request that cannot be carried out as given.

    The message has one to three lines: what was given, what is allowed, what to do. Every verb
    prints it without a traceback and exits with code 2.
    """
