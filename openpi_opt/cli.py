"""What the verbs share: exit codes, an error instead of a traceback, progress, arguments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from openpi_opt.errors import UserError, masked

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

USER_ERROR = 2
INTERRUPTED = 130  # what a shell reports for a process ended by SIGINT
PIPE_CLOSED = 141  # the same for SIGPIPE


def run(main: Callable[[], int]) -> NoReturn:
    """Run a verb and exit with its code.

    A `UserError` becomes `error: ...` on stderr and code 2, Ctrl-C code 130. A reader that closed
    the pipe (`compare ... | head`) has what it wanted: nothing is printed, code 141. Any other
    exception is a defect of this project and keeps its traceback.
    """
    try:
        code = main()
        sys.stdout.flush()  # here, so that a closed pipe is met inside the try
    except UserError as error:
        print(f"error: {masked(str(error))}", file=sys.stderr)
        code = USER_ERROR
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = PIPE_CLOSED
    sys.exit(code)


def say(text: str) -> None:
    """Progress, on stderr: stdout holds what was asked for alone."""
    print(text, file=sys.stderr, flush=True)


def print_uncut(console: Console, table: Table) -> None:
    """Print a table whose columns all have a `min_width`: none becomes narrower than that.

    Where the console is too narrow, lines run over. Left to itself rich cuts digits off then.
    """
    least = least_width(table)
    if least > console.width:
        table.width = least
    console.print(table, crop=False, no_wrap=True)


def least_width(table: Table) -> int:
    """The width of a table whose columns all are at their `min_width`."""
    _, right, _, left = table.padding
    columns = [left + (column.min_width or 0) + right for column in table.columns]
    between = len(columns) - 1 if table.box else 0
    return sum(columns) + between + (2 if table.show_edge else 0)


def at_least(minimum: int) -> Callable[[str], int]:
    """A parser of whole numbers for argparse, which turns its errors into messages."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    parse.__name__ = "whole number"  # argparse: invalid whole number value
    return parse
