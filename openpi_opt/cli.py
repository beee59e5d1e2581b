"""What the verbs share: exit codes, an error instead of a traceback, progress, arguments."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from openpi_opt.errors import UserError, masked

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
    finally:  # also when Hydra exits by itself
        # To look through all objects of torch or MLflow for garbage once more, as the interpreter
        # does on its way out, takes most of a second and frees nothing that outlives the process.
        gc.freeze()
    sys.exit(code)


def say(text: str) -> None:
    """Progress, on stderr: stdout holds what was asked for alone."""
    print(text, file=sys.stderr, flush=True)


def at_least(minimum: int) -> Callable[[str], int]:
    """A parser of whole numbers for argparse, which turns its errors into messages."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    parse.__name__ = "whole number"  # argparse: invalid whole number value
    return parse
