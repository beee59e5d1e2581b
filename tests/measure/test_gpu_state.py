"""Reading the driver. Where there is no GPU, a module of the library's shape stands in for it."""

import importlib
import os
import subprocess
import sys
from dataclasses import replace

import pynvml
import pytest
from drivers import FakeAmdSmi, FakeNvml

from openpi_opt.machine import Gpu, probe
from openpi_opt.measure.gpu_state import Monitor, between, monitor
from openpi_opt.result import GpuState
from openpi_opt.vendor.amd import AmdSmi
from openpi_opt.vendor.base import NotReadError
from openpi_opt.vendor.nvidia import Nvml

H100 = Gpu(0, "GPU-abc", "NVIDIA H100", "nvidia", "sm90", 81_000, "570.1")
MI300 = Gpu(0, "GPU-00000000000000ff", "MI300X", "amd", "gfx942", 196_000, "6.12")


def test_everything_nvml_says():
    nvml = FakeNvml()
    nvml.limit_w, nvml.pids = 650, [4001]
    nvml.reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonGpuIdle
    watching = Monitor(Nvml(nvml, H100))
    nvml.pids.append(os.getpid())
    assert watching.read() == GpuState(
        sm_clock_mhz=1755,
        max_sm_clock_mhz=1980,
        memory_clock_mhz=2619,
        temperature_c=61,
        power_w=652.3,
        power_limit_w=650,
        default_power_limit_w=700,
        throttle_reasons=["sw_power_cap"],
        other_processes=1,
        not_read=[],
    )
    assert watching.throttled_ms() == {
        "thermal": 2.5 * (pynvml.NVML_PERF_POLICY_THERMAL + 1),
        "power": 2.5 * (pynvml.NVML_PERF_POLICY_POWER + 1),
    }


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetCurrentClocksEventReasons", "throttle_reasons"),
        ("nvmlDeviceGetComputeRunningProcesses", "other_processes"),
    ],
)
def test_what_nvml_refuses_is_named_and_the_rest_is_read(function, name):
    state = Monitor(Nvml(FakeNvml(silent=function), H100)).read()
    assert getattr(state, name) is None
    assert state.not_read == [f"{name}: NVML: Not Supported"]
    assert state.sm_clock_mhz == 1755


def test_no_counter_of_throttled_time():
    nvml = FakeNvml(silent="nvmlDeviceGetViolationStatus")
    assert Monitor(Nvml(nvml, H100)).throttled_ms() is None


@pytest.mark.parametrize(
    ("before", "now", "others"),
    [
        ([], [], 0),
        ([], ["own"], 0),
        ([], ["own", 7], 1),
        ([7], ["own", 7], 1),
        # In a container the driver has numbers of its own: ours is the one that came.
        ([], [9001], 0),
        ([], [9001, 9002], 1),
        ([7], [7, 9001], 1),
        ([7], [7], 1),
        ([7], [9001], 0),
    ],
)
def test_our_own_process_is_not_another_one(before, now, others):
    nvml = FakeNvml()
    nvml.pids = before
    watching = Monitor(Nvml(nvml, H100))
    nvml.pids = [os.getpid() if pid == "own" else pid for pid in now]
    assert watching.read().other_processes == others


def test_a_driver_that_is_not_there(monkeypatch):
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    with monitor(H100) as watching:
        state = watching.read()
        assert watching.throttled_ms() is None
    assert state.model_dump(exclude={"not_read"}, exclude_none=True) == {}
    assert len(state.not_read) == 9
    assert state.not_read[0] == "sm_clock_mhz: NVML: Driver Not Loaded"


def test_everything_amdsmi_says(monkeypatch):
    smi = FakeAmdSmi()
    monkeypatch.setitem(sys.modules, "amdsmi", smi)
    with monitor(MI300) as watching:
        state = watching.read()
        assert watching.throttled_ms() is None
    assert state == GpuState(
        sm_clock_mhz=2100,
        max_sm_clock_mhz=2100,
        memory_clock_mhz=1300,
        temperature_c=55,
        power_w=540,
        power_limit_w=750,
        default_power_limit_w=750,
        throttle_reasons=["power_cap"],
        other_processes=1,
    )
    assert smi.log == ["init", "shut down"]


def test_an_older_amdsmi_and_gpu():
    smi = FakeAmdSmi()
    smi.socket_power = "N/A"
    del smi.amdsmi_get_violation_status
    state = Monitor(AmdSmi(smi, MI300)).read()
    assert state.power_w == 530
    assert state.not_read == ["throttle_reasons: this amdsmi has no amdsmi_get_violation_status"]


def test_a_gpu_that_amdsmi_does_not_show():
    with pytest.raises(NotReadError, match="no GPU that is GPU-0000000000000abc"):
        AmdSmi(FakeAmdSmi(), replace(MI300, uuid="GPU-0000000000000abc"))


@pytest.mark.parametrize(
    "text",
    [
        "raise ImportError('no')",
        "libraries = {}\nlibraries['libamd_smi.so']",
        "raise OSError('libamd_smi.so')",
        "None.amdsmi_init",
    ],
)
def test_amdsmi_is_not_needed(text, tmp_path, monkeypatch):
    """Nor its library, without which its import fails in ways of its own."""
    (tmp_path / "amdsmi.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
    importlib.invalidate_caches()
    with monitor(MI300) as watching:
        state = watching.read()
    assert state.sm_clock_mhz is None
    assert "amdsmi, which comes with ROCm, cannot be imported" in state.not_read[0]


def test_throttled_time_is_the_difference():
    state = GpuState()
    found = between(state, state, {"thermal": 10.0, "power": 5.0}, {"thermal": 12.5, "power": 5.0})
    assert found is not None
    assert found.throttled_ms == {"thermal": 2.5, "power": 0.0}
    assert between(None, None, None, None) is None
    half = between(state, state, None, {"thermal": 1.0})
    assert half is not None
    assert half.throttled_ms is None


def test_importing_makes_no_gpu_context():
    code = "import sys, openpi_opt.measure.gpu_state; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
def test_a_real_gpu():
    torch = pytest.importorskip("torch")
    gpus = probe().gpus
    if not gpus or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with monitor(gpus[0]) as watching:
        matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        for _ in range(200):
            matrix = torch.nn.functional.normalize(matrix @ matrix)
        state = watching.read()
        torch.cuda.synchronize()
    assert state.sm_clock_mhz is not None
    assert state.max_sm_clock_mhz is not None
    assert 0 < state.sm_clock_mhz <= state.max_sm_clock_mhz
    assert state.temperature_c is None or 10 < state.temperature_c < 110
    assert state.power_w is None or 20 < state.power_w < 2000
    assert state.other_processes == 0
