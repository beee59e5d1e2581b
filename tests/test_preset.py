from pathlib import Path

import pytest
import yaml
from machine_samples import machine
from space_samples import AITER, MACHINES

from openpi_opt import preset
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.paths import conf_dir
from openpi_opt.process.run import refused
from openpi_opt.space.compose import compose
from openpi_opt.space.points import left_out

PROVENANCE = {"study": "s", "model": {"name": "pi0_mini", "rope_frequencies": "float32"}}


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"compile": {"mode": "default"}, "precision": {"dtype": "float32"}},
        {"attention": {"vision": "sdpa", "prefill": "sdpa", "denoise": "sdpa"}},
        {"attention": {"vision": "sdpa", "denoise": "aiter"}, "graph": {"mode": "manual"}},
        {"blas": {"backend": "fp8", "fp8": {"stages": ["vision"]}}},
    ],
)
def test_a_written_preset_composes_to_the_same_knobs(tmp_path: Path, raw: dict) -> None:
    cfg = Config.parse(raw)
    preset.write(tmp_path / "anything.yaml", cfg, PROVENANCE)
    again = compose([], preset="anything", preset_dir=tmp_path)
    assert again.knobs == cfg.knobs
    assert again.model.rope_frequencies == "float32"
    written = yaml.safe_load((tmp_path / "anything.yaml").read_text())
    # Only what differs from the defaults is named.
    assert all(written[name] == raw[name] for name in written.keys() & cfg.knobs.keys())


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65, "a\n", "ü"])
def test_names_cannot_leave_the_folder(name: str) -> None:
    with pytest.raises(UserError, match="preset name"):
        preset.preset_path(name, None)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        preset.write(tmp_path / "file" / "p.yaml", Config.parse({}), PROVENANCE)


@pytest.mark.parametrize(
    "file", sorted((conf_dir() / "preset").glob("*.yaml")), ids=lambda f: f.stem
)
def test_the_presets_that_come_along_compose(file: Path) -> None:
    cfg = compose(["platform=cuda"], preset=file.stem)
    assert not cfg.is_baseline()
    assert cfg.model.name == yaml.safe_load(file.read_text())["provenance"]["model"]["name"]


SEEDS = {"mi350_runbook": "gfx950", "mi300x_seeds": "gfx942", "h200_seeds": "sm90"}


@pytest.mark.parametrize(("name", "arch"), SEEDS.items())
def test_presets_of_the_seeds_run_on_their_hardware_and_say_what_they_are(
    name: str, arch: str
) -> None:
    here = machine(arch, AITER)
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
    here = machine(arch, AITER if aiter else None) if arch else MACHINES["cpu"]
    result = refused(compose([], preset=name).resolved(here), here)
    assert result is not None
    assert result.outcome == "unavailable"
    assert all(word in result.reason for word in words)


@pytest.mark.parametrize("name", SEEDS)
def test_groups_that_a_seeds_preset_names_can_be_replaced(name: str) -> None:
    assert compose(["graph=none"], preset=name).knobs["graph"].mode == "none"
