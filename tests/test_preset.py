from pathlib import Path

import pytest
import yaml

from openpi_opt import preset
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.machine import AiterPackage, Gpu, Machine, TorchBuild
from openpi_opt.paths import conf_dir
from openpi_opt.process.run import refused
from openpi_opt.space.compose import compose
from openpi_opt.space.points import left_out

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


SEEDS = {"mi350_runbook": "gfx950", "mi300x_seeds": "gfx942", "h200_seeds": "sm90"}


def machine(arch: str, aiter: bool = True) -> Machine:
    amd = arch.startswith("gfx")
    gpu = Gpu(0, "GPU-1", arch, "amd" if amd else "nvidia", arch, 80_000, "1")
    build = TorchBuild("2.13.0", None if amd else "13.0", "7.1" if amd else None)
    found = Machine((gpu,), build, "x", 2, 1)
    found.__dict__["aiter"] = AiterPackage("amd", "0.1", "/nowhere") if aiter else None
    return found


@pytest.mark.parametrize(("name", "arch"), SEEDS.items())
def test_presets_of_the_seeds_run_on_their_hardware_and_say_what_they_are(
    name: str, arch: str
) -> None:
    here = machine(arch)
    cfg = compose([], preset=name).resolved(here)
    assert cfg.canonical() == cfg
    assert left_out(cfg, here, allow_lossy=False) is None
    assert cfg.workload.name == "seed_b1"
    document = yaml.safe_load((conf_dir() / "preset" / f"{name}.yaml").read_text())
    provenance = document["provenance"]
    assert provenance["status"] == "reported, not measured here"
    amd = arch.startswith("gfx")
    assert len(provenance["corrected"]) == (2 if amd else 0)
    assert ("is_causal" in str(provenance["corrected"])) == amd


@pytest.mark.parametrize(
    ("name", "arch", "aiter", "words"),
    [
        ("mi350_runbook", "sm90", True, ["HIP_FORCE_DEV_KERNARG", "cuda"]),
        ("mi300x_seeds", "sm90", True, ["HIP_FORCE_DEV_KERNARG", "cuda"]),
        ("mi350_runbook", "gfx950", False, ["aiter"]),
        ("mi300x_seeds", "gfx942", False, ["aiter"]),
        ("h200_seeds", "", False, ["graph=manual", "CPU"]),
        ("mi300x_seeds", "", False, ["HIP_FORCE_DEV_KERNARG", "cpu"]),
    ],
)
def test_presets_of_the_seeds_say_what_a_machine_lacks(
    name: str, arch: str, aiter: bool, words: list[str]
) -> None:
    cpu = Machine((), TorchBuild("2.13.0", None, None), "x", 2, 1)
    here = machine(arch, aiter) if arch else cpu
    result = refused(compose([], preset=name).resolved(here), here)
    assert result is not None
    assert result.outcome == "unavailable"
    assert all(word in result.reason for word in words)


@pytest.mark.parametrize("name", SEEDS)
def test_groups_that_a_seeds_preset_names_can_be_replaced(name: str) -> None:
    assert compose(["graph=none"], preset=name).knobs["graph"].mode == "none"
