"""Presets by machine, model and workload; warnings of another machine."""

from typing import Any

import pytest
import yaml

from openpi_opt import load_policy, preset
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.machine import probe
from openpi_opt.space.compose import compose
from openpi_opt.track.fingerprint import fingerprint

H100 = "NVIDIA H100 80GB HBM3"


def promoted(
    mean_ms: float, gpu: str | None = H100, model: str = "pi0", workload: str = "three", **more: Any
) -> dict[str, Any]:
    return {
        "study": "s",
        "machine": {"gpu": gpu, "cpu": "x"},
        "model": {"name": model},
        "workload": {"name": workload},
        "mean_ms": mean_ms,
        **more,
    }


KNOWN = {
    "slow": promoted(20.0),
    "fast": promoted(10.0),
    "fp8": promoted(5.0, lossy=True),
    "reported": {k: v for k, v in promoted(1.0).items() if k != "mean_ms"},
    "long": promoted(12.0, workload="openpi"),
    "h200": promoted(8.0, gpu="NVIDIA H200"),
    "h200_pi05": promoted(8.0, gpu="NVIDIA H200", model="pi05"),
    "cpu": promoted(900.0, gpu=None),
}


@pytest.mark.parametrize(
    ("gpu", "model", "workload", "name"),
    [
        (H100, "pi0", "three", "fast"),
        (H100, None, "openpi", "long"),
        ("NVIDIA H200", "pi05", None, "h200_pi05"),
        (None, None, None, "cpu"),
    ],
)
def test_auto_is_the_fastest_that_is_measured_exact_and_fits(gpu, model, workload, name):
    assert preset.auto(KNOWN, gpu, model, workload) == name


@pytest.mark.parametrize(
    ("gpu", "model", "workload", "words", "listed"),
    [
        ("AMD MI300X", None, None, "no measured preset is for AMD MI300X", "h200_pi05: "),
        (H100, "pi05", None, "no measured preset is for NVIDIA H100 80GB HBM3, model pi05", "slow"),
        (H100, None, None, "several models or workloads fit", "long: NVIDIA H100"),
    ],
)
def test_auto_refuses_with_the_list(gpu, model, workload, words, listed):
    with pytest.raises(UserError) as refused:
        preset.auto(KNOWN, gpu, model, workload)
    assert words in str(refused.value)
    assert listed in str(refused.value)
    assert "reported" not in str(refused.value)
    assert "fp8" not in str(refused.value)


@pytest.fixture
def here(tmp_path):
    """A folder with a preset of this CPU, and one that cannot be read."""
    cfg = Config.parse({"attention": {"vision": "sdpa"}})
    model, workload = ({"name": name} for name in ("pi0_mini", "w"))
    found = promoted(3.0, None) | {"model": model, "workload": workload}
    preset.write(tmp_path / "mine.yaml", cfg, found)
    (tmp_path / "broken.yaml").write_text("{")
    return tmp_path


def test_auto_is_a_name_like_any_other(here, capsys):
    words = ["platform=cpu", "model=pi0_mini"]
    cfg = compose(words, "auto", here)
    assert cfg.knobs["attention"] != cfg.baseline().knobs["attention"]
    assert "preset=auto: mine (x, pi0_mini, workload w, 3.0 ms)" in capsys.readouterr().err
    assert preset.resolve_auto(["preset=auto", *words], here) == ["preset=mine", *words]
    with pytest.raises(UserError, match="preset=auto"):
        preset.resolve_auto(["preset=auto", "platform=cpu", "model=pi05"], here)


def test_another_machine_is_told_and_the_same_is_not():
    gpu = {"name": H100, "driver": "580", "arch": "sm90"}
    seen = {"gpu": gpu, "cpu": "y", "torch": {"version": "2.11"}, "triton": "3.6", "aiter": None}
    found = promoted(10.0) | {"versions": {"torch": {"version": "2.11"}, "triton": "3.5"}}
    assert preset.other_machine(found, seen) == ["promoted with triton 3.5, here it is 3.6"]
    found["versions"]["triton"] = "3.6"
    assert preset.other_machine(found, seen) == []
    on_cpu = preset.other_machine(found, {**seen, "gpu": None})
    assert on_cpu == [f"promoted with gpu {H100}, here it is absent"]
    assert preset.other_machine(promoted(1.0, None), {**seen, "gpu": None}) == [
        "promoted with cpu x, here it is y"
    ]


def test_load_policy_warns_of_another_machine(here):
    file = here / "mine.yaml"
    document = yaml.safe_load(file.read_text())
    workload = Config.parse({"workload": {"horizon": 4, "steps": 1}}).workload
    document["provenance"]["workload"] = workload.model_dump(mode="json")
    file.write_text("# @package _global_\n" + yaml.safe_dump(document))
    with pytest.warns(UserWarning, match="preset mine: promoted with cpu x, here it is"):
        load_policy("mine", overrides=["platform=cpu"], preset_dir=here)
    cpu = fingerprint(probe(), Config.parse({"platform": {"device": "cpu"}}).platform)["cpu"]
    document["provenance"]["machine"]["cpu"] = cpu
    file.write_text("# @package _global_\n" + yaml.safe_dump(document))
    load_policy("mine", overrides=["platform=cpu"], preset_dir=here)
