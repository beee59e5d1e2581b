"""Nothing is decided on what was true before a wait: real leases, threads and processes."""

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from search_samples import FakeRun, ok

from openpi_opt import preset, promote
from openpi_opt import session as sessions
from openpi_opt.config import Config
from openpi_opt.confirm.fresh import FreshRuns
from openpi_opt.errors import UserError
from openpi_opt.machine import probe
from openpi_opt.process.devices import LEASES_VARIABLE, reserve
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.left import TAGS_FILE, read_lines
from openpi_opt.track.store import Store

CONTEXT = {"model": {"name": "pi0_mini"}, "platform": {"device": "cpu"}}
PLAIN, SDPA, FUSED = (
    Config.parse({**CONTEXT, **raw}).resolved(probe())
    for raw in ({}, {"attention": {"vision": "sdpa"}}, {"fusion": {"qkv": True}})
)
LEVELS = {PLAIN.hash(): 100.0, SDPA.hash(): 90.0, FUSED.hash(): 70.0}


def judge(cfg: Config) -> Any:
    return ok(cfg, LEVELS[cfg.hash()])


def found(store: Store, study: str, *configs: Config) -> Path:
    """What a sweep found, as it appends it."""
    folder = store.study_dir(study)
    journal, mark = Journal.open(folder), fingerprint_hash(fingerprint(probe(), PLAIN.platform))
    for cfg in configs:
        role = "baseline" if cfg.is_baseline() else "trial"
        journal.append(Record(study=study, role=role, result=judge(cfg), fingerprint_hash=mark))
    return folder


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv(LEASES_VARIABLE, str(tmp_path / "leases"))
    fake = partial(FreshRuns, run=FakeRun(judge))
    monkeypatch.setattr(promote, "FreshRuns", fake)
    monkeypatch.setattr(sessions, "FreshRuns", fake)
    return Store.open(tmp_path / "store")


def said(capsys: pytest.CaptureFixture[str], words: str, seen: list[str]) -> bool:
    seen.append(capsys.readouterr().err)
    return words in "".join(seen)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def promoted(store: Store, study: str, *more: str) -> list[str]:
    folder = ["--store", str(store.path), "--preset-dir", str(store.path.parent / "presets")]
    return [study, "--name", "x", "--rounds", "3", "--no-mlflow", *folder, *more]


def in_thread(main: Callable[[list[str]], int], command: list[str]) -> tuple[Any, list[Any]]:
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append(main(command))
        except UserError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


def test_what_the_sweep_finds_during_the_wait_competes(store, capsys):
    found(store, "s", PLAIN, SDPA)
    lease = reserve(PLAIN, probe(), None, [], print)
    thread, ended = in_thread(promote.main, promoted(store, "s"))
    seen: list[str] = []
    until(lambda: said(capsys, "in use", seen))
    found(store, "s", FUSED)
    lease.release()
    thread.join()
    assert ended == [0]
    document = yaml.safe_load((store.path.parent / "presets" / "x.yaml").read_text())
    assert document["provenance"]["config_hash"] == FUSED.hash()


@pytest.mark.parametrize("verb", ["ladder", "ablate"])
def test_a_better_one_found_during_the_wait_is_the_target(verb, store, capsys):
    found(store, "s", PLAIN, SDPA)
    arguments = sessions.target_parser(verb, "").parse_args(
        ["s", "--store", str(store.path), "--no-mlflow"]
    )
    session = sessions.target_session(verb, arguments)
    assert session.config.hash() == SDPA.hash()
    lease = reserve(PLAIN, probe(), None, [], print)

    def waits(_: list[str]) -> int:
        with session.alone(None):
            return len(session.target.knobs)

    thread, ended = in_thread(waits, [])
    seen: list[str] = []
    until(lambda: said(capsys, "in use", seen))
    found(store, "s", FUSED)
    lease.release()
    thread.join()
    assert ended == [1]
    assert session.config.hash() == FUSED.hash()
    assert said(capsys, "the study has a better one by now: fusion=", seen)


def test_of_two_promotions_with_one_name_the_second_says_so(store, capsys):
    first, second = found(store, "s", PLAIN, SDPA), found(store, "t", PLAIN, FUSED)
    lease = reserve(PLAIN, probe(), None, [], print)
    thread, ended = in_thread(promote.main, promoted(store, "t"))
    seen: list[str] = []
    until(lambda: said(capsys, "in use", seen))
    path = store.path.parent / "presets" / "x.yaml"
    preset.write(path, SDPA, {"study": "s"})
    lease.release()
    thread.join()
    [error] = ended
    assert "exists" in str(error)
    assert yaml.safe_load(path.read_text())["provenance"]["study"] == "s"
    assert read_lines(second / TAGS_FILE) == [], "no tag without a preset"
    assert len(Journal.read(second)) == 2, "and nothing was measured for it"
    assert promote.main(promoted(store, "s", "--force")) == 0
    assert promote.main(promoted(store, "t", "--force")) == 0
    assert [tag["value"] for tag in read_lines(first / TAGS_FILE)] == ["x", "x (replaced)"]
    assert [tag["value"] for tag in read_lines(second / TAGS_FILE)] == ["x"]


def test_a_time_that_can_never_do_is_refused_before_the_wait(store):
    """Three rounds of two processes of a minute each: the device is never asked for."""
    found(store, "s", PLAIN, SDPA)
    lease = reserve(PLAIN, probe(), None, [], print)
    command = promoted(store, "s", "--minutes", "1")
    at = command.index("--rounds")
    del command[at : at + 2]
    thread, ended = in_thread(promote.main, command)
    thread.join(timeout=60)
    refused_at_once = bool(ended)
    lease.release()
    thread.join()
    assert refused_at_once
    assert re.search(r"--minutes 1 is too short .* at least \d+ minutes are needed", str(ended[0]))


def write_at_once(path: Path, study: str, start: Any, won: Any) -> None:
    start.wait()
    try:
        preset.write(path, PLAIN, {"study": study})
    except UserError as error:
        assert "another promotion" in str(error)  # noqa: PT017  the parent counts those that won
    else:
        won.put(study)


def test_of_processes_that_write_one_preset_at_once_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        path = tmp_path / f"p{attempt}.yaml"
        start, won = context.Barrier(4), context.Queue()
        writers = [
            context.Process(target=write_at_once, args=(path, f"s{n}", start, won))
            for n in range(4)
        ]
        for writer in writers:
            writer.start()
        winner = won.get(timeout=60)
        for writer in writers:
            writer.join()
        assert [writer.exitcode for writer in writers] == [0] * 4
        assert won.empty()
        assert yaml.safe_load(path.read_text())["provenance"]["study"] == winner
        assert [each.name for each in tmp_path.iterdir() if each.suffix == ".tmp"] == []


def killed_while_writing(path: Path) -> None:
    os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    preset.write(path, PLAIN, {"study": "s"})


def test_a_kill_while_a_preset_is_written_leaves_nothing(tmp_path):
    if not hasattr(os, "O_TMPFILE"):
        pytest.skip("no nameless files on this system")
    writer = multiprocessing.get_context("fork").Process(
        target=killed_while_writing, args=(tmp_path / "p.yaml",)
    )
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
