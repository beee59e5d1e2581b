from pathlib import Path

import pytest
import yaml

from openpi_opt import preset
from openpi_opt.compose import compose
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.paths import conf_dir

PROVENANCE = {"study": "s", "model": {"name": "pi0_mini", "rope_frequencies": "float32"}}


def knobs(raw: dict) -> Config:
    return Config.parse(raw)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"compile": {"mode": "default"}, "precision": {"dtype": "float32"}},
        {"attention": {"vision": "sdpa", "prefill": "sdpa", "denoise": "sdpa"}},
        {"attention": {"vision": "sdpa", "denoise": "aiter"}, "graph": {"mode": "manual"}},
    ],
)
def test_a_written_preset_composes_to_the_same_knobs(tmp_path: Path, raw: dict) -> None:
    cfg = knobs(raw)
    preset.write(tmp_path / "anything.yaml", cfg, PROVENANCE)
    again = compose([], preset="anything", preset_dir=tmp_path)
    assert again.knobs == cfg.knobs
    assert again.model.rope_frequencies == "float32"


def test_a_group_on_the_command_line_wins_over_the_preset(tmp_path: Path) -> None:
    cfg = knobs({"attention": {"vision": "sdpa", "prefill": "sdpa", "denoise": "sdpa"}})
    preset.write(tmp_path / "p.yaml", cfg, PROVENANCE)
    again = compose(["attention=eager"], preset="p", preset_dir=tmp_path)
    assert again.is_baseline()
    assert compose(["model=pi0"], preset="p", preset_dir=tmp_path).model.name == "pi0"


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65, "a\n", "ü"])
def test_names_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(UserError, match="preset name"):
        preset.preset_path(name, None)


def test_unknown_presets_and_knobs_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        compose([], preset="nowhere", preset_dir=tmp_path)
    (tmp_path / "bad.yaml").write_text("# @package _global_\nwarp: {drive: 9}\n")
    with pytest.raises(UserError, match="warp"):
        compose([], preset="bad", preset_dir=tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        preset.write(tmp_path / "file" / "p.yaml", knobs({}), PROVENANCE)


def test_presets_are_plain_data(tmp_path: Path) -> None:
    preset.write(tmp_path / "p.yaml", knobs({}), PROVENANCE)
    document = yaml.safe_load((tmp_path / "p.yaml").read_text())
    assert document["provenance"]["study"] == "s"
    assert {"override /compile": "off"} in document["defaults"]


@pytest.mark.parametrize(
    "file", sorted((conf_dir() / "preset").glob("*.yaml")), ids=lambda f: f.stem
)
def test_the_presets_that_come_along_compose(file: Path) -> None:
    cfg = compose(["platform=cuda"], preset=file.stem)
    assert not cfg.is_baseline()
    assert cfg.model.name == yaml.safe_load(file.read_text())["provenance"]["model"]["name"]
