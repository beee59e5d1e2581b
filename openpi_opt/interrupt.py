"""Ctrl-C, SIGTERM and a closed terminal, from the first line of a verb to its last.

The first press raises KeyboardInterrupt within `main`, and there is time to end trials and copies.
The second one ends the process where it is: the journal makes any exit safe, the kernel frees the
locks, and watchers end the trials. Before `main` nothing has begun, so the first press ends the
process. After `main` it is ignored.

Python raises KeyboardInterrupt wherever the main thread happens to be. In an import it leaves
torsos of modules, and may come out as something else. In a destructor or a callback it is printed
and forgotten, and a library may swallow it. So it waits for the end of an import, and is raised
again when it has not left `main` and no exception is being handled.

The package itself loads this module before all others, so it imports only what is there already.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys

TYPE_CHECKING = False  # typing's would take as long as all of this
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

INTERRUPTED = 130  # what a shell reports for a process ended by SIGINT
NOTHING = "nothing was begun"
# Started and ended by others, which is SIGTERM's business alone: they have nothing to save.
_WORKERS = ("openpi_opt.trial", "openpi_opt.measure.ceilings")
_AGAIN_SECONDS = 0.05
_SHOW_CURSOR = b"\x1b[?25h"


class _State:
    """Of this process. `raised`: KeyboardInterrupt was, for the press."""

    begun = ended = pressed = raised = told = False
    kept = NOTHING


_state = _State()


def arm_at_start(package: str) -> None:
    """Take the signals over when this process is `python -m` of a module of `package`.

    To be called by the package itself, on its first lines. Programs that only use the package
    keep their own handlers.
    """
    if sys.argv[:1] != ["-m"]:  # what Python puts there until it has found the module
        return
    name = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    if name.split(".")[0] == package:
        arm(name in _WORKERS)


def arm(worker: bool = False) -> None:
    """Take over SIGINT and, but for a worker, SIGTERM and SIGHUP; what is ignored stays ignored."""
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    numbers = (signal.SIGINT,) if worker else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        if signal.getsignal(number) in defaults:  # nohup ignores SIGHUP, and is to stay right
            signal.signal(number, _on_signal)
    sys.unraisablehook = _on_unraisable


def inside(main: Callable[[], int], kept: str) -> int:
    """Run `main`, the only place where a press raises KeyboardInterrupt.

    `kept` is what to tell of an interruption: what is kept.
    """
    _state.kept, _state.told = kept, False
    _state.begun, _state.ended = True, False
    try:
        return main()
    finally:
        _state.ended = True
        signal.setitimer(signal.ITIMER_REAL, 0)


def pressed() -> bool:
    """Whether one of the signals came."""
    return _state.pressed


def heeded() -> None:
    """Note that a press was for a wait alone, and is done with: `main` goes on."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    _state.pressed = _state.raised = False


def told() -> None:
    """Note that what is kept was said, so that `tell` need not."""
    _state.told = True


def tell(more: str = "") -> None:
    """Say what is kept, on stderr, unless it was said."""
    if not _state.told:
        _state.told = True
        with contextlib.suppress(OSError):  # of a terminal that was closed
            # Not by print, which a signal may have interrupted.
            os.write(2, f"interrupted: {_state.kept}{more}\n".encode())


def _on_signal(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGHUP:
        _let_go_of_terminal()
        if _state.pressed:
            return  # a shell sends it once more than the kernel
    if _state.pressed or not _state.begun:
        tell()
        if os.isatty(2):  # a progress display may have hidden it
            os.write(2, _SHOW_CURSOR)
        os._exit(INTERRUPTED)
    _state.pressed = True
    if not _state.ended:
        signal.signal(signal.SIGALRM, _on_alarm)
        signal.siginterrupt(signal.SIGALRM, False)  # system calls are not disturbed
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS, _AGAIN_SECONDS)
        _raise_in(frame)


def _on_alarm(number: int, frame: FrameType | None) -> None:
    cleaning_up = _state.raised and sys.exc_info()[1] is not None
    if not (cleaning_up or _state.ended):
        _raise_in(frame)


def _raise_in(frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, unless an import is under way."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return
        frame = frame.f_back
    _state.raised = True
    raise KeyboardInterrupt


def _let_go_of_terminal() -> None:
    """What is still to be said must not fail because nobody can read it."""
    for fd in (1, 2):
        try:
            os.write(fd, b"")
        except OSError as error:
            if error.errno == errno.EIO:  # a terminal that was closed
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def _on_unraisable(unraisable: Any) -> None:
    """After a press what torsos complain about in their destructors is no news."""
    if not _state.pressed:
        sys.__unraisablehook__(unraisable)
