"""Configurations and names are data: none runs code, leaves its folder or reads a token."""

import os
from pathlib import Path

import pytest
from command_samples import HEAD
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from openpi_opt import preset
from openpi_opt.errors import UserError, masked
from openpi_opt.space import compose as composing
from openpi_opt.space.files import check_option
from openpi_opt.track.store import Store

CODE = "{_target_: logging.FileHandler, filename: PROOF}"
EVIL = {
    "callbacks": "hydra: {callbacks: {x: " + CODE + "}}",
    "job_logging": "hydra: {job_logging: {handlers: {x: {class: logging.FileHandler, "
    "filename: PROOF}}}}",
    "hydra_logging": "hydra: {hydra_logging: {handlers: {x: {(): logging.FileHandler, "
    "filename: PROOF}}}}",
    "sweeper": "hydra: {sweeper: {_target_: logging.FileHandler}}",
    "launcher": "hydra: {launcher: {_target_: logging.FileHandler}}",
    "knob": "attention: {_target_: os.system}",
    "deep": "provenance: {machine: [{versions: {_target_: os.system}}]}",
    "partial": "provenance: {_partial_: true}",
    "env_copy": "hydra: {job: {env_copy: [HOME]}}",
    "env_set": "hydra: {job: {env_set: {LD_PRELOAD: x}}}",
    "folder": "hydra: {run: {dir: PROOF}, output_subdir: x}",
    "variable": "tracking: {experiment: '${oc.env:MY_TOKEN}'}",
    "nested": "tracking: {experiment: '${oc.env:${study}}'}",
    "default": "tracking: {experiment: 'x${oc.env:HOME,${oc.env:MY_TOKEN}}'}",
    "secret_path": "tracking: {experiment: '${oc.env:GITHUB_TOKEN}'}",
    "parent": "defaults: [../../outside]",
    "override": "defaults: [{override /attention: ../../outside}]",
    "absolute": "defaults: [/outside]",
    "tag": "attention: {vision: !!python/object/apply:os.system ['touch PROOF']}",
    "tag_new": "attention: !!python/object/new:os.system ['touch PROOF']",
    "tag_name": "attention: {vision: !!python/name:os.system }",
}


@pytest.fixture
def proof(command, monkeypatch):
    """A file that exists if something of the evil was done; and a file outside of all groups."""
    path = command.folder / "proof"
    for name, text in EVIL.items():
        file = command.folder / "conf" / "preset" / f"evil_{name}.yaml"
        file.write_text(HEAD + text.replace("PROOF", str(path)) + "\n")
    (command.folder / "outside.yaml").write_text("vision: sdpa\n")
    monkeypatch.setenv("MY_TOKEN", "hunter2")
    monkeypatch.setenv("GITHUB_TOKEN", "hunter2")
    return path


@pytest.mark.parametrize("name", EVIL)
def test_a_preset_from_elsewhere_runs_nothing_and_reads_nothing(command, proof, name, capfd):
    words = (f"preset=evil_{name}", "platform=cpu")
    ways: list[tuple[str, ...]] = [(), ("-m", "attention=sdpa,eager"), ("--cfg", "all")]
    several = name in ("callbacks", "hydra_logging", "variable", "parent")
    messages = [command.error(*more, *words) for more in (ways if several else ways[:1])]
    with pytest.raises(UserError) as error:  # where a policy is loaded
        composing.compose([], f"evil_{name}", command.folder / "conf" / "preset")
    assert "hunter2" not in "".join([*messages, str(error.value), *capfd.readouterr()])
    assert not proof.exists()
    assert not (command.folder / "mlruns").exists()


@pytest.mark.parametrize(
    "word",
    [
        "+hydra.callbacks.x._target_=os.system",
        "+attention._target_=os.system",
        "hydra.sweeper._target_=os.system",
        "attention=../../../outside",
        "preset=../../outside",
        "space=../../outside",
        "experiment=../../outside",
        "workload=/outside",
        "study=../outside",
        "preset='a\\0b'",
        f"preset={'a' * 5000}",
        f"study={'a' * 5000}",
        f"experiment={'a' * 5000}",
    ],
)
def test_words_of_a_command_line_that_lead_out(command, proof, word):
    before = sorted(command.folder.rglob("*"))
    command.error(word, "platform=cpu")
    assert sorted(command.folder.rglob("*")) == before


def test_places_may_be_read_and_own_options_have_names(command, capfd):
    where = command.folder / "conf" / "preset" / "where.yaml"
    where.write_text(HEAD + "provenance: {from: '${oc.env:HOME}'}\n")
    assert command("--dry-run", "preset=where", "platform=cpu") == 0
    for group, options in {"preset": ("h100", "a.b-c"), "space": ("full",), "a": ("x/y",)}.items():
        for option in options:
            check_option(group, option)
    assert "would run" in capfd.readouterr().out


WILD = st.one_of(
    st.text(max_size=300),
    st.lists(
        st.sampled_from(["..", ".", "/", "a", "\0", "\n", "~", "ä", "%2e", "\\", "C:", " "]),
        max_size=8,
    ).map("".join),
)


@example("../x")
@example("/etc/passwd")
@example("a/../../b")
@example("a\0")
@example("x" * 100_000)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WILD)
def test_no_name_leaves_its_folder(tmp_path, name):
    for where in (study_of, preset_of, option_of):
        folder = tmp_path / where.__name__
        try:
            path = where(folder, name)
        except UserError as error:
            message = str(error)
        else:
            message = ""
        assert len(message) < 1000
        if message:
            continue
        assert Path(os.path.normpath(path)).is_relative_to(folder)
        assert path != folder
        assert "\0" not in name


def study_of(folder: Path, name: str) -> Path:
    return Store(folder).study_dir(name)


def preset_of(folder: Path, name: str) -> Path:
    return preset.preset_path(name, folder)


def option_of(folder: Path, name: str) -> Path:
    check_option("group", name)
    return folder / f"{name}.yaml"


def test_a_link_in_place_of_a_study_is_not_followed_out(tmp_path):
    store, outside = Store.open(tmp_path / "store"), tmp_path / "outside"
    outside.mkdir()
    (outside / "study.json").write_text("{}")
    (store.path / "studies").mkdir()
    (store.path / "studies" / "a").symlink_to(outside)
    for find in (store.study_dir, store.find_study):
        with pytest.raises(UserError, match="a link that leads out"):
            find("a")
    (store.path / "studies" / "real").mkdir()
    (store.path / "studies" / "b").symlink_to("real")
    assert store.study_dir("b").name == "b"
    (tmp_path / "linked").symlink_to(store.path)
    assert Store.open(tmp_path / "linked").study_dir("real").name == "real"


def test_a_link_in_place_of_a_preset_is_replaced_and_its_target_untouched(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = preset.preset_path("p", tmp_path)
    path.symlink_to(victim)
    preset.write(path, composing.compose([]), {"study": "s"}, replace=True)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:hunter2@db:5432/o", "postgresql://***@db:5432/o"),
        ("mysql+pymysql://me:hu@nter2@db/o and more", "mysql+pymysql://***@db/o and more"),
        ("http://hunter2@host", "http://***@host"),
        (
            "postgresql:///o?user=me&password=hunter2&x=1",
            "postgresql:///o?user=me&password=***&x=1",
        ),
        ("no secret@home, sqlite:////a/b@c", "no secret@home, sqlite:////a/b@c"),
    ],
)
def test_passwords_of_urls_are_masked(text, shown):
    assert masked(text) == shown
