"""Real processes, played by small scripts: only here may a child be a stand-in."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hosts import wait_for
from process_samples import LIMITS, SAY

from openpi_opt.process import child, locks, watcher
from openpi_opt.process.child import Ended, Place, StoppedError, run_command
from openpi_opt.process.devices import Slot


class Scripts:
    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "log.txt"
        self.phases: list[str] = []

    def run(
        self,
        body: str,
        limits: dict[str, float] | None = None,
        on_phase: Callable[[str], None] | None = None,
        place: Place | None = None,
    ) -> Ended:
        script = self.folder / "child.py"
        own = f"open({str(self.folder / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        script.write_text(SAY + own + textwrap.dedent(body))
        argv, hook = [sys.executable, str(script)], on_phase or self.phases.append
        own_limits = {**LIMITS, **(limits or {})}
        return run_command(argv, dict(os.environ), own_limits, self.log, hook, place)

    def assert_gone(self) -> None:
        pid = int((self.folder / "pid").read_text())
        wait_for(lambda: (found := watcher.look(pid)) is None or not found.lives)


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


def test_phases_and_exit(scripts: Scripts) -> None:
    ended = scripts.run("phase('load'); print('hello'); phase('measure'); sys.exit(3)")
    assert scripts.phases == ["load", "measure"]
    assert (ended.returncode, ended.phase, ended.exceeded) == (3, "measure", None)
    assert set(ended.phase_seconds) == {"start", "load", "measure"}
    assert scripts.log.read_text() == "hello\n"


def test_a_silent_child_is_seen_to_end_at_once(scripts: Scripts) -> None:
    began = time.monotonic()
    ended = scripts.run("os.close(int(sys.argv[-1])); time.sleep(0.3)")
    assert ended.returncode == 0
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("body", "limits", "exceeded"),
    [
        ("phase('load'); time.sleep(60)", {"load": 0.3}, 0.3),
        ("time.sleep(60)", {"start": 0.3}, 0.3),  # before any phase
        (
            "phase('load'); time.sleep(1.5); phase('measure'); time.sleep(1.5)",
            {"load": 2.8, "measure": 2.8},  # each has a clock of its own
            None,
        ),
        ("while True: phase('load'); time.sleep(0.05)", {"load": 0.5}, 0.5),  # no more time
    ],
)
def test_a_phase_past_its_limit_is_ended(
    scripts: Scripts, body: str, limits: dict[str, float], exceeded: float | None
) -> None:
    began = time.monotonic()
    ended = scripts.run(body, limits)
    assert (ended.exceeded, ended.returncode) == (exceeded, -signal.SIGTERM if exceeded else 0)
    assert time.monotonic() - began < 40


@pytest.mark.parametrize(
    ("body", "number", "start", "grace"),
    [
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", signal.SIGKILL, 60.0, 0.3),
        ("os.kill(os.getpid(), signal.SIGSTOP)", signal.SIGTERM, 1.0, 20.0),
    ],
    ids=["ignores SIGTERM", "stopped"],
)
def test_what_ignores_sigterm_is_killed_and_what_is_stopped_hears_it(
    scripts: Scripts,
    body: str,
    number: signal.Signals,
    start: float,
    grace: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child, "GRACE_SECONDS", grace)
    ended = scripts.run(f"{body}\nphase('load')\ntime.sleep(60)", {"start": start, "load": 0.3})
    assert ended.exceeded is not None
    assert ended.returncode == -number


ESCAPE = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        {closing}
        os.execve("/bin/sleep", ["sleep", "600"], {{}})
    os._exit(0)
os.wait()
phase("load")
"""


@pytest.mark.parametrize("closing", ["os.closerange(0, 256)", "pass"], ids=["closed", "inherited"])
def test_what_escapes_its_session_and_environment_ends_and_is_named(
    scripts: Scripts, closing: str
) -> None:
    lock = locks.take(scripts.folder / "lease.lock")
    assert lock is not None
    place = Place(uid=uuid4().hex, fds=(lock.fd,))
    ended = scripts.run(ESCAPE.format(closing=closing), place=place)
    lock.release()
    assert (ended.returncode, ended.left) == (0, ("sleep",))
    assert not locks.is_held(scripts.folder / "lease.lock")
    assert not [each for each in watcher.descendants(os.getpid()) if each.name == "sleep"]


def test_all_ends_when_the_watcher_is_killed(scripts: Scripts) -> None:
    """And the trial's own end is told by its signal."""

    def kill(_: str) -> None:
        me = watcher.look(int((scripts.folder / "pid").read_text()))
        assert me is not None
        os.kill(me.parent, signal.SIGKILL)

    ended = scripts.run("phase('load'); time.sleep(300)", on_phase=kill)
    assert ended.returncode == -signal.SIGKILL
    scripts.assert_gone()


@pytest.mark.parametrize("count", [4, 5])
def test_a_kill_by_the_kernel_is_told_from_the_counter(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int
) -> None:
    files = [tmp_path / "memory.events", tmp_path / "memory.oom_control", tmp_path / "absent"]
    files[0].write_text("low 0\noom 3\noom_kill 4\n")
    files[1].write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    monkeypatch.setattr(child, "oom_files", lambda: files)
    assert child.oom_kills() == 9
    ended = scripts.run(
        f"open({str(files[0])!r}, 'w').write('oom_kill {count}'); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert ended.returncode == -signal.SIGKILL
    assert (ended.exceeded, ended.oom_killed) == (None, count == 5)


def test_what_was_said_just_before_the_end_counts(scripts: Scripts) -> None:
    def busy(phase: str) -> None:
        time.sleep(1)

    ended = scripts.run("phase('load'); time.sleep(0.3); phase('measure')", on_phase=busy)
    assert ended.phase == "measure"


def test_garbage_on_the_pipe_is_no_phase(scripts: Scripts) -> None:
    body = """
    os.write(int(sys.argv[-1]), b"\\xff\\x00" * 200000 + b"\\n")
    for line in ("[1]", "{", '{"phase": 7}', '{"phase": "unheard of"}', '{"phase": "load"}'):
        say(line)
    """
    assert scripts.run(body).phase == "load"


def test_no_descriptor_is_left_open(scripts: Scripts) -> None:
    before = len(os.listdir("/proc/self/fd"))
    scripts.run("phase('load')")
    with pytest.raises(FileNotFoundError):
        run_command(["/nonexistent"], {}, LIMITS, scripts.log, print)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_printed_is_kept_at_both_ends(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "HEAD_BYTES", 1000)
    monkeypatch.setattr(child, "TAIL_BYTES", 100_000)
    scripts.run("for i in range(300_000): print(f'line {i:06}')")
    text = scripts.log.read_text()
    assert text.startswith("line 000000\n")
    assert text.endswith("line 299999\n")
    assert "bytes left out" in text
    assert 100_000 < len(text) < 300_000


def test_a_child_that_prints_for_ever_is_ended_in_time(scripts: Scripts) -> None:
    tracemalloc.start()
    try:
        ended = scripts.run("phase('load')\nwhile True: os.write(1, b'x' * 65536)", {"load": 0.5})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ended.exceeded == 0.5
    assert peak < 16 * 2**20
    assert scripts.log.stat().st_size < 6 * 2**20


@pytest.mark.parametrize("how", ["stop", "stop of a deaf one", "interruption"])
def test_a_stop_from_another_thread_and_an_interruption_end_the_group(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if "deaf" in how else ""
    monkeypatch.setattr(child, "GRACE_SECONDS", 1.0 if deaf else 60.0)
    stop = threading.Event()

    def on_phase(phase: str) -> None:
        if how == "interruption":
            raise KeyboardInterrupt
        stop.set()

    error: Any = KeyboardInterrupt if how == "interruption" else StoppedError
    with pytest.raises(error):
        scripts.run(f"{deaf}phase('load')\ntime.sleep(300)", None, on_phase, Place(stop=stop))
    scripts.assert_gone()


def test_a_child_has_its_cores_an_empty_input_and_a_group_of_its_own(scripts: Scripts) -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    scripts.run(
        "print(os.sched_getaffinity(0), repr(sys.stdin.read()), os.getpgid(0) == os.getpid())",
        place=Place(Slot("a core", "cpu", None, (core,))),
    )
    assert scripts.log.read_text() == f"{{{core}}} '' True\n"
    assert os.sched_getaffinity(0) == before
