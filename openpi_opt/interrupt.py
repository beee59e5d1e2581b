"""Ctrl-C, SIGTERM and a closed terminal, from the first line of a verb to its last.

Python raises KeyboardInterrupt wherever the main thread happens to be, which goes wrong in several
places. In an import it leaves torsos of modules, and may come out as something else (pydantic makes
a SchemaError of it). In a destructor or a callback it is printed and forgotten; a library may
swallow it. Before `main` and after it nobody catches it. Here instead:

* before `main`, nothing has begun: the process ends at once;
* within `main`, KeyboardInterrupt is raised, but not amid an import or what is `shielded`: then
  after it. Is it lost (it has not left `main`, and no exception is being handled), it is raised
  again;
* after `main` all is done, and what Python still does takes a moment: the first press is ignored;
* a second press ends now, wherever the first one has got to.

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
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Any

INTERRUPTED = 130  # what a shell reports for a process ended by SIGINT
NOTHING = "nothing was begun"
# Started and ended by others, which is SIGTERM's business alone: they have nothing to save.
_WORKERS = ("openpi_opt.trial", "openpi_opt.measure.ceilings")
_AGAIN_SECONDS = 0.05


class _State:
    """Of this process. `raised`: KeyboardInterrupt was, for the first press."""

    begun = False
    presses = 0
    raised = False
    told = False
    kept = NOTHING
    shields = 0


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
    _state.begun = True
    return main()


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """What is not to be left half done: the first press waits for its end, the second does not.

    In any thread but the main one, which is never interrupted, this does nothing.
    """
    import threading  # long since loaded, but not when this module is

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.shields += 1
    try:
        yield
    finally:
        _state.shields -= 1
    if pressed():
        _on_alarm(signal.SIGALRM, sys._getframe())


def over() -> None:
    """Note that `main` has ended: nobody is to be woken any more."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def pressed() -> bool:
    """Whether one of the signals came."""
    return _state.presses > 0


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
        if pressed():
            return  # a shell sends it once more than the kernel
    _state.presses += 1
    first = _state.presses == 1
    if not _is_inside(frame):
        if not (first and _state.begun):
            tell()
            os._exit(INTERRUPTED)
        return
    if first:
        _look_again()
    if first and not _may_raise(frame):
        return
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


def _look_again() -> None:
    """Come back later, and again, without disturbing system calls."""
    signal.signal(signal.SIGALRM, _on_alarm)
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS, _AGAIN_SECONDS)


def _on_alarm(number: int, frame: FrameType | None) -> None:
    if not _is_inside(frame):
        over()
        return
    cleaning_up = _state.raised and sys.exc_info()[1] is not None
    if _may_raise(frame) and not cleaning_up:
        _state.raised = True
        raise KeyboardInterrupt


def _on_unraisable(unraisable: Any) -> None:
    """After a press what torsos complain about in their destructors is no news."""
    if not pressed():
        sys.__unraisablehook__(unraisable)


def _is_inside(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is inside.__code__:
            return True
        frame = frame.f_back
    return False


def _may_raise(frame: FrameType | None) -> bool:
    """Whether neither an import nor something shielded is under way."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return False
        frame = frame.f_back
    return _state.shields == 0
