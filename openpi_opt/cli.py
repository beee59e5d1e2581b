"""What the verbs share: exit codes, an error instead of a traceback, progress, arguments."""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from openpi_opt import interrupt
from openpi_opt.errors import UserError, masked
from openpi_opt.vendor import BY_NAME

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from openpi_opt.machine import Machine

USER_ERROR = 2
INTERRUPTED = interrupt.INTERRUPTED
PIPE_CLOSED = 141  # what a shell reports for a process ended by SIGPIPE
CONTINUED = "what had finished is kept; the same command goes on"


def run(main: Callable[[], int], kept: str = "nothing was changed") -> NoReturn:
    """Run a verb and exit with its code.

    A `UserError` becomes `error: ...` on stderr and code 2, Ctrl-C a line that says what is `kept`
    and code 130, whatever exception became of it on its way. A reader that closed the pipe
    (`compare ... | head`) has what it wanted: nothing is printed, code 141. Any other exception is
    a defect of this project and keeps its traceback.
    """
    cause = ""
    code: Any
    try:
        code = interrupt.inside(lambda: _flushed(main), kept)
    except SystemExit as end:
        code = end.code
    except UserError as error:
        _complain(f"error: {masked(str(error))}")
        code = USER_ERROR
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        code = PIPE_CLOSED
    except BaseException as error:
        if not interrupt.pressed():
            raise
        cause = f" (on the way out: {_one_line(error)})"
        code = INTERRUPTED
    finally:  # also when Hydra exits by itself
        # To look through all objects of torch or MLflow for garbage once more, as the interpreter
        # does on its way out, takes most of a second and frees nothing that outlives the process.
        gc.freeze()
    interrupt.over()
    if interrupt.pressed() and code:
        code = INTERRUPTED
    if code == INTERRUPTED:
        interrupt.tell(cause)
        try:
            sys.stdout.flush()
        except OSError:  # of a terminal that was closed
            _drop_stdout()
    sys.exit(code)


def _flushed(main: Callable[[], int]) -> int:
    """Here, so that a closed pipe is met inside the try."""
    code = main()
    sys.stdout.flush()
    return code


def _drop_stdout() -> None:
    """The interpreter flushes stdout once more at exit; let that go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # of a terminal that was closed
        print(text, file=sys.stderr)


def _one_line(error: BaseException) -> str:
    """Type, message and place, for a line instead of a traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" in {trace.tb_frame.f_code.co_filename} line {trace.tb_lineno}" if trace else ""
    text = " ".join(masked(str(error)).split())
    return f"{type(error).__name__}: {text[:200]}{where}"


def say(text: str) -> None:
    """Progress, on stderr: stdout holds what was asked for alone."""
    print(text, file=sys.stderr, flush=True)


def this_machine() -> Machine:
    """What this machine has; says on stderr what it does not answer, and a GPU that is not used."""
    from openpi_opt.machine import probe

    machine = probe()
    for trouble in machine.troubles if machine.gpus else ():  # else whoever wants one is refused
        say(f"warning: {trouble} ({trouble.mend})")
    for gpu in machine.gpus:
        device = BY_NAME[gpu.vendor].device
        if machine.torch is not None and not machine.built_for(device):
            say(
                f"warning: {gpu.name} is not used: the installed torch ({machine.torch.version}) "
                f"was not built for {BY_NAME[gpu.vendor].runtime}"
            )
            break
    return machine


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


def minutes(text: str) -> float:
    """A positive number of minutes, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of minutes")
    return value


minutes.__name__ = "number"  # argparse: invalid number value
