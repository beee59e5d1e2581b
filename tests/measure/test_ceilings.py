"""Ceilings of a machine: measured in a real process, kept, read again, or from a datasheet."""

import json
import os

import pytest

from openpi_opt.config import Config
from openpi_opt.machine import Gpu, Machine, TorchBuild, probe
from openpi_opt.measure import ceilings

CFG = Config.parse({"platform": {"device": "cpu"}})
H100 = Machine(
    (Gpu(0, "GPU-abc", "NVIDIA H100 80GB HBM3", "nvidia", "sm90", 81_000, "570.1"),),
    TorchBuild("2.13.0+cu130", "13.0", None),
    "Intel Xeon",
    16,
    128_000,
)


def test_measured_once_in_a_process_of_its_own_then_read(tmp_path):
    machine, begun = probe(), []
    found, notes = ceilings.obtain(
        CFG, machine, tmp_path / "c", os.environ, lambda: begun.append(1)
    )
    assert notes == []
    assert found is not None
    assert found.source == "measured"
    assert found.device == machine.cpu
    assert set(found.tflops) == {"float32", "bfloat16", "float16"}  # a CPU has no TF32
    assert 1 < found.bandwidth_gb_s < 5_000
    assert 0.001 < found.tflops["float32"] < 100
    again, notes = ceilings.obtain(CFG, machine, tmp_path / "c", {}, lambda: begun.append(2))
    assert (again, notes, begun) == (found, [], [1])
    (file,) = (tmp_path / "c").glob("*.json")
    document = json.loads(file.read_text())
    assert max(document["copy_gb_s"], document["read_gb_s"]) == found.bandwidth_gb_s
    for damaged in ("", "{}", '{"schema_version": 1', file.read_text().replace("cores", "x")):
        file.write_text(damaged)
        assert ceilings.read(file, ceilings.machine_key(machine, CFG)) is None


def test_another_gpu_driver_or_torch_is_another_machine():
    cfg = Config.parse({"platform": {"device": "cuda"}})
    gpu = H100.gpus[0]
    others = [
        Machine((Gpu(**{**vars(gpu), **change}),), H100.torch, "x", 2, 1)
        for change in ({"uuid": "GPU-abd"}, {"driver": "580"})
    ]
    others.append(Machine((gpu,), TorchBuild("2.12.0", "13.0", None), "x", 2, 1))
    keys = [ceilings.machine_key(machine, cfg) for machine in (H100, *others)]
    assert len({json.dumps(key) for key in keys}) == len(keys)


def test_what_cannot_be_measured_is_the_datasheets_and_says_so(tmp_path):
    """The process of the measurement sees no GPU, so it fails."""
    cfg = Config.parse({"platform": {"device": "cuda"}})
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    found, notes = ceilings.obtain(cfg, H100, tmp_path, hidden, lambda: None)
    assert found is not None
    assert found.source == "datasheet"
    assert found.tflops["bfloat16"] == pytest.approx(989.4)
    assert "could not be measured (exit code 1" in notes[0]
    assert not list(tmp_path.glob("*.json"))
    unknown = Machine((Gpu(**{**vars(H100.gpus[0]), "name": "X"}),), H100.torch, "x", 2, 1)
    cfg = Config.parse({"platform": {"device": "cuda"}, "profile": {"roofline": "datasheet"}})
    found, notes = ceilings.obtain(cfg, unknown, tmp_path, os.environ, lambda: None)
    assert found is None
    assert notes == ["No floor: there is no datasheet here for X."]


def test_too_little_time_is_said(tmp_path):
    cfg = Config.parse({"platform": {"device": "cpu"}, "limits": {"ceilings": 0.1}})
    found, notes = ceilings.obtain(cfg, probe(), tmp_path, os.environ, lambda: None)
    assert found is None
    assert "limits.ceilings gives it more" in notes[0]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 PCIe",
        "NVIDIA H200",
        "AMD Instinct MI300X OAM",
        "AMD Instinct MI350X",
        "AMD Instinct MI355X",
    ],
)
def test_datasheets_are_of_dense_products(name):
    """FP8 twice bfloat16, which is far above float32: a figure with sparsity would stand out."""
    found = ceilings.datasheet(name)
    assert found is not None
    assert found.source == "datasheet"
    tflops = found.tflops
    assert tflops["fp8"] == pytest.approx(2 * tflops["bfloat16"], rel=0.01)
    assert 7 < tflops["bfloat16"] / tflops["float32"] < 17
    assert ceilings.datasheet(f"{name} NVL") is None


def test_the_cache_is_that_of_the_last_level_once_per_group_of_cores(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    for core in cores:
        for index, (level, size, shared) in enumerate([(1, "48K", core), (3, "32768K", "0-7")]):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            (folder / "level").write_text(f"{level}\n")
            (folder / "size").write_text(f"{size}\n")
            (folder / "shared_cpu_list").write_text(f"{shared}\n")
    assert ceilings.cpu_cache_bytes(tmp_path) == 32 * 2**20
    assert ceilings.cpu_cache_bytes(tmp_path / "none") == 0
