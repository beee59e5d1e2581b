import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from openpi_opt import machine


def kfd_node(root: Path, number: int, properties: dict[str, int], vram: int = 0) -> None:
    node = root / str(number)
    node.mkdir(parents=True)
    text = "".join(f"{key} {value}\n" for key, value in properties.items())
    (node / "properties").write_text(text)
    bank = node / "mem_banks" / "0"
    bank.mkdir(parents=True)
    (bank / "properties").write_text(f"heap_type 1\nsize_in_bytes {vram}\n")


def test_amd_gpus_are_read_from_the_kernel(tmp_path: Path) -> None:
    kfd_node(tmp_path, 0, {"simd_count": 0, "cpu_cores_count": 64})
    kfd_node(
        tmp_path,
        1,
        {
            "simd_count": 1216,
            "gfx_target_version": 90402,
            "unique_id": 255,
            "drm_render_minor": 900,
        },
        vram=192 * 2**30,
    )
    kfd_node(tmp_path, 2, {"simd_count": 1024, "gfx_target_version": 90500}, vram=288 * 2**30)
    gpus = machine.amd_gpus(tmp_path)
    assert [g.arch for g in gpus] == ["gfx942", "gfx950"]
    assert [g.index for g in gpus] == [0, 1]
    assert gpus[0].uuid == "GPU-00000000000000ff"
    assert gpus[0].memory_mib == 192 * 1024


def test_visible_devices_are_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(
        machine.Gpu(i, f"GPU-{i}abc", "H100", "nvidia", "sm90", 80_000, "1") for i in range(4)
    )
    chosen = machine._visible_only
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert chosen(gpus, "CUDA_VISIBLE_DEVICES") == gpus
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-0a")
    assert [g.index for g in chosen(gpus, "CUDA_VISIBLE_DEVICES")] == [2, 0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert chosen(gpus, "CUDA_VISIBLE_DEVICES") == ()


def test_hip_counts_what_rocr_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        properties = {"simd_count": 1, "gfx_target_version": 90402, "unique_id": number}
        kfd_node(tmp_path, number, properties)
    monkeypatch.setattr(machine, "_KFD_NODES", tmp_path)
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "GPU-0000000000000003,1")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    found = [gpu for gpu in machine.probe().gpus if gpu.vendor == "amd"]
    assert [(gpu.index, gpu.uuid[-1]) for gpu in found] == [(1, "1")]


@pytest.mark.parametrize(("is_amd", "kind"), [(True, "amd"), (False, "unrelated")])
def test_the_unrelated_aiter_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_amd: bool, kind: str
) -> None:
    package = tmp_path / "aiter"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    if is_amd:
        (package / "ops").mkdir()
        (package / "_version.py").write_text("version = '0.1.20'\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    found = machine.find_aiter()
    assert found is not None
    assert found.kind == kind
    if is_amd:
        assert found.version == "0.1.20"


def test_probe_does_not_import_torch() -> None:
    code = (
        "import sys; from openpi_opt import config, machine, preset; machine.probe();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_probe_reads_the_torch_build() -> None:
    import torch

    found = machine.probe()
    assert found.torch is not None
    assert found.torch.version == torch.__version__
    assert found.torch.cuda == torch.version.cuda
    assert found.cores >= 1
    assert found.memory_mib > 100
