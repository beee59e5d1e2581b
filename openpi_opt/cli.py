"""What the verbs share: exit codes, an error instead of a traceback, progress, arguments."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import gc
import io
import math
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from openpi_opt import interrupt
from openpi_opt.errors import UserError, masked
from openpi_opt.vendor import BY_NAME

if TYPE_CHECKING:
    from openpi_opt.machine import Machine

USER_ERROR = 2
INTERRUPTED = interrupt.INTERRUPTED
PIPE_CLOSED = 141  # what a shell reports for a process ended by SIGPIPE
# What characters become where a stream's encoding lacks them: plus-minus, times, arrow, dashes.
_PLAIN = {"\u00b1": "+-", "\u00d7": "x", "\u2192": "->", "\u2013": "-", "\u2014": "-"}
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
    _usable_streams()
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
        unnamed = isinstance(error, OSError) and error.filename is None
        refused = _stdout_refuses() if unnamed else None
        if refused is not None:
            _complain(f"error: stdout takes no more: {refused.strerror}. What is recorded is kept.")
            _drop_stdout()
            code = USER_ERROR
        elif interrupt.pressed():
            cause = f" (on the way out: {_one_line(error)})"
            code = INTERRUPTED
        else:
            raise
    finally:  # also when Hydra exits by itself
        # To look through all objects of torch or MLflow for garbage once more, as the interpreter
        # does on its way out, takes most of a second and frees nothing that outlives the process.
        gc.freeze()
    if interrupt.pressed() and code:
        code = INTERRUPTED
    if code == INTERRUPTED:
        interrupt.tell(cause)
        try:
            sys.stdout.flush()
        except OSError:  # of a terminal that was closed
            _drop_stdout()
    sys.exit(code)


def _usable_streams() -> None:
    """Let stdout and stderr take any text, and exist.

    A terminal or a batch system's log may be ASCII: `±` becomes `+-` there, a line of a table `-`,
    `|` or `+`, an accented letter its letter, and anything else `?`. A stream that was closed at
    the start would be the next file that is opened; it becomes /dev/null.
    """
    codecs.register_error("openpi_opt.plain", _in_plain_characters)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            os.set_inheritable(null, null == number)  # and then also for children
            setattr(sys, name, os.fdopen(null, "w", encoding="utf-8"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="openpi_opt.plain")


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_plain, error.object[error.start : error.end])), error.end


def _plain(character: str) -> str:
    name = unicodedata.name(character, "")
    if name.startswith("BOX DRAWINGS"):
        bent = " AND " in name  # a corner or a crossing
        return "+" if bent else {"HORIZONTAL": "-", "VERTICAL": "|"}.get(name.split()[-1], "+")
    if name.endswith("BLOCK"):
        return "#"
    letters = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return _PLAIN.get(character) or letters or "?"


def _stdout_refuses() -> OSError | None:
    """Why stdout does not take what was printed; None where it takes an empty line."""
    try:
        print(flush=True)
    except OSError as error:
        return error
    return None


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
    places = traceback.extract_tb(error.__traceback__)
    where = f" in {places[-1].filename} line {places[-1].lineno}" if places else ""
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
