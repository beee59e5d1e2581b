"""The findings on made-up machines, and the command on this one with and without its packages."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from drivers import FakeAmdSmi, FakeNvml

from openpi_opt import doctor
from openpi_opt.doctor import HAZARDS, Finding, Host, required
from openpi_opt.knobs.environment import REFUSED
from openpi_opt.machine import AiterPackage, Gpu, Machine, TorchBuild
from openpi_opt.paths import package_dir
from openpi_opt.process.environment import cleared_names
from openpi_opt.vendor import amd
from openpi_opt.vendor.base import Trouble

ROOT = Path(__file__).parent.parent
H100 = Gpu(0, "GPU-abc", "NVIDIA H100", "nvidia", "sm90", 81_559, "570.1")
MI300X = Gpu(0, "GPU-00ff", "MI300X", "amd", "gfx942", 196_608, "6.12")
CUDA = TorchBuild("2.13.0+cu130", "13.0", None)
ROCM = TorchBuild("2.13.0+rocm7.2", None, "7.2.53211")


def machine(
    *gpus: Gpu, torch: TorchBuild | None = None, aiter: AiterPackage | None = None
) -> Machine:
    made = Machine(gpus, torch, "AMD EPYC", 2, 24_000)
    made.__dict__["aiter"] = aiter  # a cached property: what the import path has does not count
    return made


def host(
    root: Path,
    made: Machine,
    environ: Mapping[str, str] | None = None,
    nvml: ModuleType | None = None,
) -> Host:
    sys.modules["pynvml"] = nvml  # type: ignore[assignment]  # None: importing it fails
    return Host(root, environ or {}, machine=made)


@pytest.fixture(autouse=True)
def _libraries_of_drivers(monkeypatch):
    for name in ("pynvml", "amdsmi"):
        monkeypatch.setitem(sys.modules, name, None)


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def found(where: Host, name: str) -> list[Finding]:
    return [finding for finding in doctor.audit(where) if finding.name == name]


def only(where: Host, name: str) -> Finding:
    (finding,) = found(where, name)
    assert bool(finding.mend) == (finding.status != "ok")
    return finding


NAMES = [name.rstrip("*") for names in HAZARDS.values() for name in names]


def test_every_finding_that_is_not_ok_has_a_mend(tmp_path):
    made = machine(MI300X, H100)
    for finding in doctor.audit(host(tmp_path, made, dict.fromkeys(NAMES, "1"))):
        assert bool(finding.mend) == (finding.status != "ok"), finding
        assert finding.what


# --- machine and drivers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "name", "status", "words"),
    [
        ("proc/sys/kernel/numa_balancing", "1\n", "NUMA balancing", "warning", "on (1)"),
        ("proc/sys/kernel/numa_balancing", "2\n", "NUMA balancing", "warning", "on (2)"),
        ("proc/sys/kernel/numa_balancing", "0\n", "NUMA balancing", "ok", "off"),
        ("proc/loadavg", "0.4 10.99 12.20 3/400 1234\n", "load", "ok", "on 2 cores"),
        ("proc/loadavg", "1.0 10.99 12.20 3/400 1234\n", "load", "ok", "on 2 cores"),
        ("proc/loadavg", "11.8 10.99 12.2 3/400 1234\n", "load", "warning", "on 2 cores"),
        ("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "powersave", "CPU governor",
         "warning", "powersave"),
        ("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "performance", "CPU governor",
         "ok", "performance"),
    ],
)  # fmt: skip
def test_what_the_kernel_says(file, text, name, status, words, tmp_path):
    assert not found(host(tmp_path, machine()), name), "nor of what it does not know"
    write(tmp_path / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance")
    write(tmp_path / file, text)
    finding = only(host(tmp_path, machine()), name)
    assert (finding.status, words in finding.what) == (status, True)


def test_the_disk_that_a_first_sweep_takes(tmp_path, monkeypatch):
    for free, on_cpu, on_gpu in (
        (2**40, "ok", "ok"),
        (2**28, "ok", "warning"),
        (2**20, *["warning"] * 2),
    ):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert only(host(tmp_path, machine(torch=CUDA)), "first sweep").status == on_cpu
        gpu = host(tmp_path, machine(H100, torch=CUDA), nvml=FakeNvml())
        assert only(gpu, "first sweep").status == on_gpu


def pci(root: Path, vendor: str, kind: str = "0x030200") -> None:
    write(root / "sys/bus/pci/devices/0000:01:00.0/vendor", vendor)
    write(root / "sys/bus/pci/devices/0000:01:00.0/class", kind)


def test_a_gpu_without_its_driver_is_a_problem_and_a_hidden_one_is_not(tmp_path):
    pci(tmp_path, "0x10de")
    finding = only(host(tmp_path, machine(), nvml=FakeNvml()), "nvidia")
    assert (finding.status, "driver" in finding.what) == ("problem", True)
    without = only(host(tmp_path, machine()), "nvidia")
    assert "nvidia-ml-py" in without.what
    hidden = host(tmp_path, machine(), {"CUDA_VISIBLE_DEVICES": ""})
    assert not found(hidden, "nvidia")
    assert "CUDA_VISIBLE_DEVICES" in only(hidden, "gpu").what
    pci(tmp_path, "0x1002", "0x120000")
    assert only(host(tmp_path, machine()), "amdgpu").status == "problem"
    pci(tmp_path, "0x1002", "0x020000")  # a network card
    assert not found(host(tmp_path, machine()), "amdgpu")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open anything")
def test_kfd_must_be_open_to_the_user(tmp_path):
    write(tmp_path / "dev/kfd").chmod(0o000)
    assert only(host(tmp_path, machine(MI300X)), "amdgpu").status == "problem"


def test_a_profiler_that_loses_kernels(tmp_path):
    old = TorchBuild("2.9.0+rocm6.4", None, "6.4.43482")
    assert only(host(tmp_path, machine(MI300X, torch=old)), "roctracer").status == "warning"
    assert not found(host(tmp_path, machine(MI300X, torch=ROCM)), "roctracer")


def test_power_and_processes_of_nvidia(tmp_path):
    made = machine(H100, torch=CUDA)
    nvml = FakeNvml()
    nvml.pids = [os.getpid()]
    quiet = host(tmp_path, made, nvml=nvml)
    assert only(quiet, "power cap").status == "ok"
    assert only(quiet, "other processes").status == "ok"
    nvml.limit_w, nvml.pids = 500, [7, 8]
    busy = host(tmp_path, made, nvml=nvml)
    assert "500 W of 700 W" in only(busy, "power cap").what
    assert "nvidia-smi -i 0 -pl 700" in only(busy, "power cap").mend
    assert "2 (processes 7, 8)" in only(busy, "other processes").what
    refused = "nvmlDeviceGetPowerManagementLimit nvmlDeviceGetComputeRunningProcesses"
    silent = host(tmp_path, made, nvml=FakeNvml(silent=refused))
    assert not found(silent, "power cap") + found(silent, "other processes")


def test_what_the_probe_was_not_told_is_named(tmp_path):
    lost = Trouble("NVIDIA GPU 3", "does not answer: GPU is lost", "reset it")
    shared = replace(H100, memory_mib=None)
    made = replace(machine(shared, torch=CUDA), troubles=(lost,), quota=1.5)
    where = host(tmp_path, made, nvml=FakeNvml())
    assert only(where, "NVIDIA GPU 3").status == "problem"
    assert "memory unknown" in only(where, "gpu 0").what
    assert "of which 1.5 may be busy" in only(where, "cpu").what
    alone = host(tmp_path, replace(machine(torch=CUDA), troubles=(lost,)), nvml=FakeNvml())
    assert not found(alone, "gpu"), "it has one"


def test_amdsmi_without_its_library_is_named(tmp_path, monkeypatch):
    write(tmp_path / "amdsmi.py", "{}['libamd_smi.so']")
    monkeypatch.syspath_prepend(tmp_path)
    del sys.modules["amdsmi"]
    finding = only(host(tmp_path, machine(MI300X, torch=ROCM)), "amdsmi")
    assert "cannot be imported: KeyError" in finding.what


def test_power_and_processes_of_amd(tmp_path, monkeypatch):
    made = machine(replace(MI300X, uuid="GPU-00000000000000ff"), torch=ROCM)
    smi = FakeAmdSmi()
    monkeypatch.setitem(sys.modules, "amdsmi", smi)
    assert only(host(tmp_path, made), "power cap").what == "gpu 0: 750 W"
    assert "1 (process 7)" in only(host(tmp_path, made), "other processes").what
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    device = write(tmp_path / "renderD128/device/unique_id", "ff\n").parent
    write(device / "hwmon/hwmon3/power1_cap", "650000000\n")
    write(device / "hwmon/hwmon3/power1_cap_default", "750000000\n")
    monkeypatch.setattr(amd, "DRM", tmp_path)
    assert "gpu 0: 650 W of 750 W" in only(host(tmp_path, made), "power cap").what
    assert "--power-cap 750" in only(host(tmp_path, made), "power cap").mend


# --- packages -------------------------------------------------------------------------------------


def test_an_old_and_a_missing_package(tmp_path, monkeypatch):
    declared = required()
    assert len(declared) > 10
    assert declared["nvidia-ml-py"] == "12.560"
    monkeypatch.setattr(doctor, "required", lambda: {"numpy": "999", "nowhere": "1"})
    where = host(tmp_path, machine())
    assert "older than 999" in only(where, "numpy").what
    assert only(where, "nowhere").what == "not installed"
    assert only(where, "nowhere").status == "problem"
    text = (ROOT / "pyproject.toml").read_text()
    python = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', text)
    assert python
    assert ((3, int(python[1])), (3, int(python[2]))) == doctor.PYTHONS


@pytest.mark.parametrize(
    ("gpu", "torch", "status"),
    [
        (H100, CUDA, "ok"),
        (MI300X, ROCM, "ok"),
        (H100, TorchBuild("2.13.0+cpu", None, None), "problem"),
        (MI300X, CUDA, "problem"),
        (H100, ROCM, "problem"),
    ],
)
def test_torch_must_be_built_for_the_gpu(gpu, torch, status, tmp_path):
    where = host(tmp_path, machine(gpu, torch=torch), nvml=FakeNvml())
    assert only(where, "torch build").status == status


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(host(tmp_path, machine(MI300X, torch=ROCM)), "C compiler").status == "problem"
    assert only(host(tmp_path, machine()), "C compiler").status == "warning"


UNRELATED = AiterPackage("unrelated", "0.13.20191203", "/x/aiter")


def test_the_wrong_aiter(tmp_path):
    amd = only(host(tmp_path, machine(MI300X, torch=ROCM, aiter=UNRELATED)), "aiter")
    assert amd.status == "problem"
    assert "pip uninstall aiter" in amd.mend
    where = host(tmp_path, machine(H100, torch=CUDA, aiter=UNRELATED), nvml=FakeNvml())
    assert only(where, "aiter").status == "warning"
    assert not found(host(tmp_path, machine(H100, torch=CUDA), nvml=FakeNvml()), "aiter")
    assert only(host(tmp_path, machine(MI300X, torch=ROCM)), "aiter").status == "warning"


OLD = "cu_num,M,N,K,bias,dtype,outdtype,scaleAB,bpreshuffle,libtype,solidx,splitK,kernelName\n"
ROW = "11,2560,1024,False,torch.bfloat16,torch.bfloat16,False,False,asm,0,0,k\n"
NEW, TABLE = f"gfx,{OLD}", "aiter tuned GEMM table"


def aiter_host(root: Path, environ: Mapping[str, str] | None = None) -> Host:
    package = AiterPackage("amd", "0.1.20", str(root / "aiter"))
    gpu = replace(MI300X, units=304)
    return host(root, machine(gpu, torch=ROCM, aiter=package), environ)


def test_a_table_without_rows_for_this_gpu(tmp_path):
    """The architecture is not enough: rows for the 80 units of another gfx942 never match."""
    file = write(tmp_path / "aiter/configs/bf16_tuned_gemm.csv", NEW)
    assert "empty" in only(aiter_host(tmp_path), TABLE).what
    file.write_text(f"{NEW}gfx950,256,{ROW}gfx942,80,{ROW}")
    finding = only(aiter_host(tmp_path), TABLE)
    assert finding.status == "warning"
    assert "no rows for gfx942 with 304 compute units (1 for gfx950 with 256" in finding.what
    models = tmp_path / "aiter/configs/model_configs"
    write(models / "pi_bf16_tuned_gemm.csv", f"{OLD}304,{ROW}80,{ROW}")
    write(models / "pi_bf16_untuned_gemm.csv", "M,N,K\n")
    finding = only(aiter_host(tmp_path), TABLE)
    assert finding.what == "1 of 4 rows for gfx942 with 304 compute units"


def test_the_table_that_the_environment_names(tmp_path):
    write(tmp_path / "aiter/configs/bf16_tuned_gemm.csv", f"{NEW}gfx942,304,{ROW}")
    mine = write(tmp_path / "mine.csv", "M,N\n")
    named = aiter_host(tmp_path, {"AITER_CONFIG_GEMM_BF16": str(mine)})
    finding = only(named, TABLE)
    assert (finding.status, "no column cu_num" in finding.what) == ("problem", True)
    missing = aiter_host(tmp_path, {"AITER_CONFIG_GEMM_BF16": str(tmp_path / "none.csv")})
    assert only(missing, TABLE).status == "problem"
    mine.write_bytes(b"gfx\n\xff\xfe\n")
    assert only(named, TABLE).status == "problem"


# --- environment ----------------------------------------------------------------------------------


def test_conflicting_variables(tmp_path):
    environ = {
        "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
        "TORCHINDUCTOR_MAX_AUTOTUNE_POINTWISE": "1",
        "HIP_LAUNCH_BLOCKING": "1",
        "CUDA_LAUNCH_BLOCKING": "0",
        "AMD_LOG_LEVEL": "",
        "PYTORCH_ALLOC_CONF": "a:b",
        "PYTORCH_CUDA_ALLOC_CONF": "a:c",
        "HIP_VISIBLE_DEVICES": "1",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    where = host(tmp_path, machine(), environ)
    named = {f.name for f in doctor.audit(where) if f.area == "environment"}
    assert named == {
        "TORCHINDUCTOR_MAX_AUTOTUNE",
        "TORCHINDUCTOR_MAX_AUTOTUNE_POINTWISE",
        "HIP_LAUNCH_BLOCKING",
        "PYTORCH_ALLOC_CONF, PYTORCH_CUDA_ALLOC_CONF",
    }
    assert only(host(tmp_path, machine()), "variables").status == "ok"


def test_a_sweep_really_clears_them_and_the_environment_knob_refuses_no_other():
    assert cleared_names(dict.fromkeys(NAMES, "1")) == sorted(NAMES)
    assert {n for n in REFUSED if n.endswith(("_BLOCKING", "_KERNEL", "_COPY"))} <= set(NAMES)


# --- the command ----------------------------------------------------------------------------------


def test_a_problem_is_exit_code_1(monkeypatch, capsys, tmp_path):
    where = host(tmp_path, machine(MI300X, torch=CUDA))
    monkeypatch.setattr(doctor, "this_host", lambda: where)
    assert doctor.main(["--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] >= 1
    assert document["problems"] == sum(f["status"] == "problem" for f in document["findings"])
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "problem  torch build" in text
    assert text.splitlines()[-1].startswith(f"{document['problems']} problem")


def command(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(path), "PATH": os.environ["PATH"]}
    return subprocess.run(
        [sys.executable, *arguments, "-m", "openpi_opt.doctor", "--json"],
        capture_output=True, text=True, env=environment, cwd=path, timeout=60,
    )  # fmt: skip


def test_with_nothing_but_python(tmp_path):
    """-S: no site-packages at all, as in a Python that was just unpacked."""
    shutil.copytree(
        package_dir(), tmp_path / "openpi_opt", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = command("-S", path=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    findings = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    for name in required():
        if name in findings:  # triton is for some platforms only
            assert findings[name]["what"] == "not installed"
            assert findings[name]["mend"]
    assert findings["torch"]["status"] == "problem"
    assert findings["python"]["status"] == "ok"


def test_here_no_heavy_package_is_imported():
    code = (
        "import sys; from openpi_opt.doctor import main; main([]); "
        "heavy = {'torch', 'pydantic', 'numpy', 'rich', 'mlflow'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "problem" in done.stdout.splitlines()[-1]
