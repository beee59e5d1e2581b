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
from uuid import uuid4

import pytest
from process_samples import LIMITS, SAY

from openpi_opt.process import child, locks, output, watcher
from openpi_opt.process.child import Ended, Place, run_command
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
        script.write_text(SAY + textwrap.dedent(body))
        argv = [sys.executable, str(script)]
        hook = on_phase or self.phases.append
        return run_command(
            argv, dict(os.environ), {**LIMITS, **(limits or {})}, self.log, hook, place
        )


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_gone(pid: int) -> bool:
    deadline = time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


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


def test_a_phase_past_its_limit_is_ended(scripts: Scripts) -> None:
    began = time.monotonic()
    ended = scripts.run("phase('load'); time.sleep(60)", {"load": 0.3})
    assert (ended.phase, ended.exceeded, ended.returncode) == ("load", 0.3, -signal.SIGTERM)
    assert time.monotonic() - began < 40


def test_the_limit_of_the_start_counts_before_any_phase(scripts: Scripts) -> None:
    assert scripts.run("time.sleep(60)", {"start": 0.3}).exceeded == 0.3


def test_each_phase_has_a_clock_of_its_own(scripts: Scripts) -> None:
    body = "phase('load'); time.sleep(1.5); phase('measure'); time.sleep(1.5)"
    assert scripts.run(body, {"load": 2.8, "measure": 2.8}).exceeded is None


def test_saying_the_same_phase_again_gives_no_more_time(scripts: Scripts) -> None:
    body = "while True: phase('load'); time.sleep(0.05)"
    assert scripts.run(body, {"load": 0.5}).exceeded == 0.5


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
@pytest.mark.parametrize("how", ["cgroup", "subreaper"])
def test_what_escapes_its_session_and_environment_ends_and_is_named(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch, how: str, closing: str
) -> None:
    name = uuid4().hex
    if how == "subreaper":
        monkeypatch.setattr(watcher, "cgroup_of", lambda _: "")
    lock = locks.take(scripts.folder / "lease.lock")
    assert lock is not None
    place = Place(uid=name, fds=(lock.fd,))
    ended = scripts.run(ESCAPE.format(closing=closing), place=place)
    lock.release()
    assert (ended.returncode, ended.left) == (0, ("sleep",))
    assert not locks.is_held(scripts.folder / "lease.lock")
    assert not [each for each in watcher.descendants(os.getpid()) if each.name == "sleep"]
    assert not Path(watcher.cgroup_of(name) or "/none").exists()


def test_all_ends_when_the_watcher_is_killed(scripts: Scripts) -> None:
    """And the trial's own end is told by its signal."""
    pid = str(scripts.folder / "pid")
    body = f"open({pid!r}, 'w').write(str(os.getpid())); phase('load'); time.sleep(300)"

    def kill(_: str) -> None:
        me = watcher.look(int(Path(pid).read_text()))
        assert me is not None
        os.kill(me.parent, signal.SIGKILL)

    assert scripts.run(body, on_phase=kill).returncode == -signal.SIGKILL
    assert wait_gone(int(Path(pid).read_text()))


def test_killed_from_outside_is_told_by_its_signal(scripts: Scripts) -> None:
    ended = scripts.run("os.kill(os.getpid(), signal.SIGKILL)")
    assert ended.returncode == -signal.SIGKILL
    assert ended.exceeded is None
    assert not ended.oom_killed


def test_a_kill_by_the_kernel_is_told_from_the_counter(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counter = tmp_path / "vmstat"
    counter.write_text("nr_free_pages 7\noom_kill 4\n")
    monkeypatch.setattr(child, "oom_files", lambda: [counter])
    ended = scripts.run(
        f"open({str(counter)!r}, 'w').write('oom_kill 5'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert ended.oom_killed


def test_children_left_behind_at_a_limit_are_ended(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.2)
    body = f"""
    import subprocess
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    open({str(scripts.folder / "pid")!r}, "w").write(str(left.pid))
    phase("load")
    time.sleep(60)
    """
    scripts.run(body, {"load": 0.5})
    assert wait_gone(int((scripts.folder / "pid").read_text()))


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


def test_an_interruption_ends_the_group_before_it_goes_on(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(phase: str) -> None:
        raise KeyboardInterrupt

    body = f"open({str(scripts.folder / 'pid')!r}, 'w').write(str(os.getpid())); phase('load')"
    with pytest.raises(KeyboardInterrupt):
        scripts.run(f"{body}; time.sleep(300)", on_phase=interrupt)
    assert wait_gone(int((scripts.folder / "pid").read_text()))


def test_no_descriptor_is_left_open(scripts: Scripts) -> None:
    before = len(os.listdir("/proc/self/fd"))
    scripts.run("phase('load')")
    with pytest.raises(FileNotFoundError):
        run_command(["/nonexistent"], {}, LIMITS, scripts.log, print)
    assert len(os.listdir("/proc/self/fd")) == before


def test_standard_input_is_empty_and_the_group_is_its_own(scripts: Scripts) -> None:
    scripts.run("print(repr(sys.stdin.read()), os.getpgid(0) == os.getpid())")
    assert scripts.log.read_text() == "'' True\n"


def test_oom_kills_reads_both_kinds_of_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / "memory.events", tmp_path / "memory.oom_control", tmp_path / "absent"]
    files[0].write_text("low 0\noom 3\noom_kill 2\n")
    files[1].write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    monkeypatch.setattr(child, "oom_files", lambda: files)
    assert child.oom_kills() == 7


def test_what_is_printed_is_kept_at_both_ends(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "HEAD_BYTES", 1000)
    monkeypatch.setattr(output, "TAIL_BYTES", 100_000)
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


@pytest.mark.parametrize("deaf", [False, True])
def test_a_stop_from_another_thread_ends_the_group(
    scripts: Scripts, monkeypatch: pytest.MonkeyPatch, deaf: bool
) -> None:
    monkeypatch.setattr(child, "GRACE_SECONDS", 1.0 if deaf else 60.0)
    stop = threading.Event()

    def on_phase(phase: str) -> None:
        stop.set()

    first = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if deaf else ""
    body = f"{first}\nopen({str(scripts.folder / 'pid')!r}, 'w').write(str(os.getpid()))"
    script = scripts.folder / "child.py"
    script.write_text(SAY + f"{body}\nphase('load')\nwhile True: time.sleep(1)")
    with pytest.raises(child.StoppedError):
        run_command(
            [sys.executable, str(script)],
            dict(os.environ),
            LIMITS,
            scripts.log,
            on_phase,
            Place(stop=stop),
        )
    assert wait_gone(int((scripts.folder / "pid").read_text()))


def test_a_child_has_its_cores_and_its_watcher_the_old_ones(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    run_command(
        [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"],
        dict(os.environ),
        LIMITS,
        tmp_path / "log.txt",
        print,
        Place(Slot("a core", "cpu", None, (core,))),
    )
    assert (tmp_path / "log.txt").read_text() == f"{{{core}}}\n"
    assert os.sched_getaffinity(0) == before
