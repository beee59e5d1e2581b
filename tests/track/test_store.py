import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_opt.errors import UserError
from openpi_opt.paths import package_dir
from openpi_opt.track.store import Store, check_study_name


def test_open_makes_the_folder_and_names_its_parts(tmp_path):
    store = Store.open(tmp_path / "a" / "b")
    assert store.path.is_dir()
    assert store.mlflow_db == tmp_path / "a/b/mlflow.db"
    assert store.optuna_db == tmp_path / "a/b/optuna.db"
    assert store.study_dir("x") == tmp_path / "a/b/studies/x"
    assert list(store.path.iterdir()) == []


def test_relative_path_is_fixed_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store.open("here").path == tmp_path / "here"


def test_a_file_is_not_a_store(tmp_path):
    (tmp_path / "file").write_text("")
    for create in (True, False):
        with pytest.raises(UserError, match="file") as caught:
            Store.open(tmp_path / "file", create=create)
        assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(UserError, match="Not a directory"):
        Store.open(tmp_path / "file" / "below")


def test_read_only_file_system_is_refused():
    with pytest.raises(UserError, match="cannot write"):
        Store.open("/proc/openpi-opt-store")


def mounted(options: str, store: Path, place: Path) -> str:
    """What opening the store says while `place` is a mount of its own with these options."""
    code = f"""
from openpi_opt.errors import UserError
from openpi_opt.track.store import Store
try:
    print(Store.open({str(store)!r}))
except UserError as error:
    print(error)
"""
    place.mkdir(parents=True)
    mount = f"mount -t tmpfs -o {options} none '{place}' || exit 77"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{mount}; exec "$0" -c "$1"', sys.executable, code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(package_dir().parent)},
    )
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    return done.stdout + done.stderr


@pytest.mark.parametrize("inside", ["", "caches"])
def test_a_mount_where_code_may_not_run_is_refused(tmp_path, inside):
    assert "mounted noexec" in mounted("noexec", tmp_path / "store", tmp_path / "store" / inside)


@pytest.mark.parametrize("inside", ["caches", "references"])
def test_read_only_folders_inside_are_refused(tmp_path, inside):
    place = tmp_path / "store" / inside
    assert f"Read-only file system; {place}" in mounted("ro", tmp_path / "store", place)


def test_open_without_create_needs_the_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Store.open(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()


def test_a_path_that_tables_cannot_show(tmp_path):
    with pytest.raises(UserError, match="control characters"):
        Store.open(tmp_path / "a\nb")
    assert list(tmp_path.iterdir()) == []


def test_find_study_lists_what_there_is(tmp_path):
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


@pytest.mark.parametrize("name", ["", "..", ".hidden", "-rf", "a/b", "a\n", "a'b", "ä", "x" * 101])
def test_bad_study_names(name):
    with pytest.raises(UserError, match="is not a study name"):
        check_study_name(name)


@pytest.mark.parametrize("name", ["a", "2026-01-02_attention=aiter,sdpa", "x" * 100, "a..b", "_+"])
def test_good_study_names(name):
    assert Store(Path("/store")).study_dir(name) == Path("/store/studies", name)


def study_dir(name: str) -> Path | str:
    """Folder of a study, or the message that refuses the name."""
    try:
        return Store(Path("/store")).study_dir(name)
    except UserError as error:
        return str(error)


@given(st.text(max_size=120) | st.text("ab./\\-_=,+ \n\0~", max_size=12))
def test_no_name_leaves_the_folder(name):
    folder = study_dir(name)
    if isinstance(folder, str):
        assert len(folder.splitlines()) <= 3
        assert all(line.isprintable() for line in folder.splitlines())
    else:
        assert os.path.normpath(folder) == str(folder) == f"/store/studies/{name}"
        assert folder.parent == Path("/store/studies")
        assert name.isascii()
        assert name.isprintable()
