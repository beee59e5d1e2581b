"""What a machine tells, and machines that tell only half of it: each probe may fail alone."""

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from drivers import FakeNvml

from openpi_opt import cli, machine
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.machine import Gpu, Machine, TorchBuild
from openpi_opt.paths import conf_dir
from openpi_opt.process.environment import child_environment
from openpi_opt.vendor import BY_NAME, VENDORS, amd, cpu
from openpi_opt.vendor.base import select

CUDA, HIP = TorchBuild("2.13.0", "13.0", None), TorchBuild("2.13.0", None, "7.1")
CHOOSING = {name for vendor in VENDORS for name in vendor.visibility}


@pytest.fixture(autouse=True)
def _nothing_is_chosen(monkeypatch, tmp_path):
    for name in CHOOSING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(amd, "KFD_NODES", tmp_path / "no kfd")
    monkeypatch.setattr(machine, "torch_build", lambda: CUDA)


def kfd_node(root: Path, number: int, properties: dict[str, int], vram: int = 0) -> None:
    node = root / str(number)
    node.mkdir(parents=True)
    text = "".join(f"{key} {value}\n" for key, value in properties.items())
    (node / "properties").write_text(text)
    bank = node / "mem_banks" / "0"
    bank.mkdir(parents=True)
    (bank / "properties").write_text(f"heap_type 1\nsize_in_bytes {vram}\n")


def kfd_gpu(root: Path, number: int, **properties: int) -> None:
    told = {"simd_count": 1216, "gfx_target_version": 90402, "drm_render_minor": 900, **properties}
    kfd_node(root, number, told, vram=192 * 2**30)


def with_nvml(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> FakeNvml:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


# --- NVIDIA ---------------------------------------------------------------------------------------


def test_a_gpu_that_tells_no_memory_is_used_with_the_host_s(monkeypatch):
    with_nvml(monkeypatch, FakeNvml(1, "nvmlDeviceGetMemoryInfo nvmlDeviceGetPciInfo"))
    found = machine.probe()
    assert [gpu.memory_mib for gpu in found.gpus] == [None]
    assert found.troubles == ()
    for memory, name in ((128_000, "pi0"), (8_000, "pi0_mini")):
        there = replace(found, memory_mib=memory)
        assert Config.parse({}).resolved(there).model.name == name


def test_a_lost_gpu_is_named_and_the_others_are_used(monkeypatch, capsys):
    with_nvml(monkeypatch, FakeNvml(8, lost=(3,)))
    assert [gpu.index for gpu in cli.this_machine().gpus] == [0, 1, 2, 4, 5, 6, 7]
    said = capsys.readouterr().err
    assert said.count("NVIDIA GPU 3: does not answer: GPU is lost") == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert len(cli.this_machine().gpus) == 2
    assert capsys.readouterr().err == "", "nobody asked for that one"


@pytest.mark.parametrize("silent", ["nvmlDeviceGetUUID", "nvmlDeviceGetName nvmlDeviceGetUUID"])
def test_gpus_without_a_uuid_have_the_names_of_their_places(monkeypatch, silent):
    with_nvml(monkeypatch, FakeNvml(2, silent))
    gpus = machine.probe().gpus
    assert [gpu.uuid for gpu in gpus] == ["PCI-0000:00:00.0", "PCI-0000:01:00.0"]
    cfg = Config.parse({"platform": {"device": "cuda", "gpu": 1}})
    env = child_environment(cfg, machine.probe(), {})
    assert (env["CUDA_VISIBLE_DEVICES"], env["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")


@pytest.mark.parametrize(
    ("chosen", "gpus"),
    [("0", [0]), ("2,0", [2, 0]), ("0,-1,1", [0]), ("0,9", [0]), ("", []), ("-1", [])],
)
def test_a_choice_is_read_as_cuda_reads_it(monkeypatch, chosen, gpus):
    with_nvml(monkeypatch, FakeNvml(8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    found = machine.probe()
    assert [gpu.index for gpu in found.gpus] == gpus
    if not gpus:  # hidden on purpose
        assert found.usable_device() == "cpu"


@pytest.mark.parametrize(
    "chosen", ["9", "MIG-12345678-aaaa", "GPU-nowhere", "all", "0 1", "GPU-", "GPU-a"]
)
def test_a_choice_of_no_gpu_is_an_error_and_never_the_cpu(monkeypatch, chosen):
    with_nvml(monkeypatch, FakeNvml(8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    for raw in ({}, {"platform": {"device": "cuda"}}):
        with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={chosen}") as error:
            Config.parse(raw).resolved(machine.probe())
        assert "platform=cpu" in str(error.value)
        assert raw or "Name GPUs that exist" in str(error.value)
    on_cpu = Config.parse({"platform": {"device": "cpu"}}).resolved(machine.probe())
    assert on_cpu.device == "cpu"


def test_instances_of_a_gpu_in_mig_mode_stand_for_it(monkeypatch):
    nvml = with_nvml(monkeypatch, FakeNvml(2))
    nvml.mig = (1,)
    assert [gpu.uuid for gpu in machine.probe().gpus] == ["GPU-abc0", "MIG-abc1/0", "MIG-abc1/1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-abc1/1")
    (only,) = machine.probe().gpus
    assert only.uuid == "MIG-abc1/1"
    assert BY_NAME["nvidia"].selection(only) == {"CUDA_VISIBLE_DEVICES": "MIG-abc1/1"}


@pytest.mark.parametrize(("value", "quiet"), [(9, True), (12, True), (18, False)])
def test_a_driver_that_is_there_and_cannot_be_used_is_an_error(monkeypatch, value, quiet):
    with_nvml(monkeypatch, FakeNvml()).init_error = value
    found = machine.probe()
    if quiet:
        assert found.usable_device() == "cpu"
        return
    with pytest.raises(UserError, match="version mismatch"):
        found.usable_device()


def test_a_gpu_that_the_installed_torch_cannot_use_is_said(monkeypatch, capsys):
    with_nvml(monkeypatch, FakeNvml(1))
    monkeypatch.setattr(machine, "torch_build", lambda: TorchBuild("2.13.0+cpu", None, None))
    assert cli.this_machine().usable_device() == "cpu"
    assert "NVIDIA H100 is not used: the installed torch (2.13.0+cpu)" in capsys.readouterr().err


# --- AMD ------------------------------------------------------------------------------------------


def test_amd_gpus_are_read_from_the_kernel(tmp_path):
    kfd_node(tmp_path, 0, {"simd_count": 0, "cpu_cores_count": 64})
    kfd_gpu(tmp_path, 1, unique_id=255, location_id=0x2300, domain=1)
    kfd_gpu(tmp_path, 2, gfx_target_version=90500)
    (tmp_path / "notes").mkdir()
    gpus, troubles = amd.kfd_gpus(tmp_path)
    assert [g.arch for g in gpus] == ["gfx942", "gfx950"]
    assert [g.index for g in gpus] == [0, 1]
    assert (gpus[0].uuid, gpus[0].pci) == ("GPU-00000000000000ff", "0001:23:00.0")
    assert gpus[0].memory_mib == 192 * 1024
    assert troubles == ()


@pytest.mark.parametrize(
    "serials",
    [(0, 0, 0), (7, 7, 8), (7, 7, 7)],
)
@pytest.mark.parametrize("places", [(0x100, 0x200, 0x300), (0x100, 0x100, 0x100), (0, 0, 0)])
def test_gpus_with_the_same_or_no_id_are_told_apart(tmp_path, serials, places):
    for number, (serial, place) in enumerate(zip(serials, places, strict=True)):
        kfd_gpu(tmp_path, number, unique_id=serial, location_id=place)
    gpus, _ = amd.kfd_gpus(tmp_path)
    assert len({gpu.uuid for gpu in gpus}) == 3


def test_a_node_without_an_architecture_is_named(tmp_path):
    kfd_gpu(tmp_path, 1, unique_id=5)
    kfd_node(tmp_path, 2, {"simd_count": 1216})
    gpus, (trouble,) = amd.kfd_gpus(tmp_path)
    assert len(gpus) == 1
    assert "does not tell its architecture" in str(trouble)


def test_hip_counts_what_rocr_shows(tmp_path, monkeypatch):
    for number in range(4):
        kfd_gpu(tmp_path, number, unique_id=number + 1)
    monkeypatch.setattr(amd, "KFD_NODES", tmp_path)
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "GPU-0000000000000004,1")
    for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):  # HIP reads either
        monkeypatch.setenv(name, "1")
        found = [gpu for gpu in machine.probe().gpus if gpu.vendor == "amd"]
        assert [(gpu.index, gpu.uuid[-1]) for gpu in found] == [(1, "2")]
        monkeypatch.delenv(name)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "2")
    monkeypatch.setattr(machine, "torch_build", lambda: HIP)
    with pytest.raises(UserError, match="HIP_VISIBLE_DEVICES=2"):
        machine.probe().usable_device()


# --- CPU and containers ---------------------------------------------------------------------------


def test_quotas_of_containers(tmp_path):
    own = tmp_path / "cgroup"
    root = tmp_path / "fs"
    (root / "kube" / "pod").mkdir(parents=True)
    own.write_text("0::/kube/pod\n")
    assert cpu.quota(root, own) is None
    (root / "kube" / "pod" / "cpu.max").write_text("max 100000\n")
    assert cpu.quota(root, own) is None
    (root / "kube" / "cpu.max").write_text("250000 100000\n")
    assert cpu.quota(root, own) == 2.5, "the least of the own group and those above"
    own.write_text("0::/\n")
    (root / "cpu.max").write_text("50000 100000\n")
    assert cpu.quota(root, own) == 0.5
    own.write_text("3:cpu,cpuacct:/docker\n")
    (root / "cpu" / "docker").mkdir(parents=True)
    (root / "cpu" / "docker" / "cpu.cfs_quota_us").write_text("400000\n")
    (root / "cpu" / "docker" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu.quota(root, own) == 4
    (root / "cpu" / "docker" / "cpu.cfs_quota_us").write_text("-1\n")
    assert cpu.quota(root, own) is None
    assert cpu.quota(root, tmp_path / "none") is None


def test_threads_stay_within_the_quota():
    there = Machine((), CUDA, "x", 64, 1, quota=4.0)
    assert [there.threads(cores) for cores in (64, 32, 16, 8)] == [4, 2, 1, 1]
    cfg = Config.parse({"platform": {"device": "cpu"}})
    assert child_environment(cfg, there, {})["OMP_NUM_THREADS"] == "4"
    assert child_environment(cfg, there, {}, threads=32)["OMP_NUM_THREADS"] == "2"
    assert child_environment(cfg, replace(there, quota=None), {}, threads=32)[
        "OMP_NUM_THREADS"
    ] == ("32")


# --- the registry ---------------------------------------------------------------------------------


def test_every_vendor_has_its_option_and_its_own_device():
    options = {path.stem for path in (conf_dir() / "platform").glob("*.yaml")}
    devices = [vendor.device for vendor in VENDORS]
    assert options == {"auto", *devices}
    assert len(set(devices)) == len({vendor.name for vendor in VENDORS}) == len(VENDORS)
    for vendor in VENDORS:
        if vendor.is_gpu:
            gpu = Gpu(2, "GPU-abc2", "x", vendor.name, "a1", None, "1")
            (chosen,) = (name for name in vendor.selection(gpu) if name in vendor.visibility)
            assert chosen not in vendor.outer_visibility


def test_an_entry_named_twice_ends_the_list():
    gpus = [Gpu(n, f"GPU-abc{n}", "x", "amd", "gfx942", 1, "1") for n in range(3)]
    found, (trouble,) = select(gpus, "ROCR_VISIBLE_DEVICES", "GPU-abc1,1,2")
    assert found == (gpus[1],)
    assert "named twice" in str(trouble)


# --- packages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_amd", "kind"), [(True, "amd"), (False, "unrelated")])
def test_the_unrelated_aiter_is_told_apart(tmp_path, monkeypatch, is_amd, kind):
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


def test_probe_does_not_import_torch():
    code = (
        "import sys; from openpi_opt import config, machine, preset; machine.probe();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_probe_reads_thetorch_build(monkeypatch):
    import torch

    monkeypatch.undo()
    found = machine.probe()
    assert found.torch is not None
    assert found.torch.version == torch.__version__
    assert found.torch.cuda == torch.version.cuda
    assert found.cores >= 1
    assert found.memory_mib > 100
