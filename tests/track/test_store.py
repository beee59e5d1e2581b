from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_opt.errors import UserError
from openpi_opt.track.store import Store, check_study_name


def test_open_makes_the_folder_and_names_its_parts(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "a" / "b")
    assert store.path.is_dir()
    assert store.mlflow_db == tmp_path / "a/b/mlflow.db"
    assert store.optuna_db == tmp_path / "a/b/optuna.db"
    assert store.study_dir("x") == tmp_path / "a/b/studies/x"
    assert list(store.path.iterdir()) == []


def test_relative_path_is_fixed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store.open("here").path == tmp_path / "here"


def test_a_file_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for create in (True, False):
        with pytest.raises(UserError, match="file") as caught:
            Store.open(tmp_path / "file", create=create)
        assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(UserError, match="Not a directory"):
        Store.open(tmp_path / "file" / "below")


def test_read_only_file_system_is_refused() -> None:
    with pytest.raises(UserError, match="cannot write"):
        Store.open("/proc/openpi-opt-store")


def test_open_without_create_needs_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Store.open(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("name", ["a?b", "a\nb"])
def test_paths_that_urls_cannot_carry(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="database URLs"):
        Store.open(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_find_study_lists_what_there_is(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    with pytest.raises(UserError, match="no study yet"):
        store.find_study("attention")
    for name in ("attention", "other"):
        store.study_dir(name).mkdir(parents=True)
        (store.study_dir(name) / "journal.jsonl").touch()
    (tmp_path / "studies" / "empty").mkdir()
    assert store.studies() == ["attention", "other"]
    assert store.find_study("attention") == tmp_path / "studies/attention"
    with pytest.raises(UserError, match=r"attention, other. Did you mean attention\?"):
        store.find_study("atention")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-rf",
        "a/b",
        "a\\b",
        "../x",
        "/etc",
        "a\nb",
        "a\n",
        "a\0",
        "a b",
        "a'b",
        "ä",
        "x" * 101,
    ],
)
def test_bad_study_names(name: str) -> None:
    with pytest.raises(UserError, match="is not a study name"):
        check_study_name(name)


@pytest.mark.parametrize("name", ["a", "2026-01-02_attention=aiter,sdpa", "x" * 100, "a..b", "_+"])
def test_good_study_names(name: str) -> None:
    check_study_name(name)


def study_dir(name: str) -> Path | str:
    """Folder of a study, or the message that refuses the name."""
    try:
        return Store(Path("/store")).study_dir(name)
    except UserError as error:
        return str(error)


@given(st.text(max_size=120) | st.text("ab./\\-_=,+ \n\0~", max_size=12))
def test_no_name_leaves_the_folder(name: str) -> None:
    folder = study_dir(name)
    if isinstance(folder, str):
        assert len(folder.splitlines()) <= 3
        assert all(line.isprintable() for line in folder.splitlines())
    else:
        assert os.path.normpath(folder) == str(folder) == f"/store/studies/{name}"
        assert folder.parent == Path("/store/studies")
        assert name.isascii()
        assert name.isprintable()
