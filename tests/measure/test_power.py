"""Energy by made-up counters whose power is known, RAPL folders as Linux has them, and refusals."""

import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from drivers import FakeAmdSmi
from hypothesis import given
from hypothesis import strategies as st

from openpi_opt.config import Config
from openpi_opt.errors import RefusedError
from openpi_opt.machine import Gpu, Machine, TorchBuild
from openpi_opt.measure import power
from openpi_opt.vendor import amd as vendor_amd
from openpi_opt.vendor import cpu, meters

CPU = Machine((), TorchBuild("2.13.0+cpu", None, None), "AMD EPYC", 2, 24_000)
GPU = Gpu(0, "GPU-00000000000000ab", "AMD Instinct MI300X", "amd", "gfx942", 192_000, "6.12")
WATT = 250.0


def config(energy: bool | str = "auto", batch: int = 1, device: str = "cpu") -> Config:
    return Config.parse(
        {
            "platform": {"device": device},
            "profile": {"energy": energy, "energy_seconds": 2},
            "workload": {"batch_size": batch},
        }
    )


def zone(folder: Path, number: str, name: str, microjoules: int) -> Path:
    path = folder / f"intel-rapl:{number}"
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text("1000000\n")
    (path / "constraint_0_power_limit_uw").write_text("150000000\n")
    return path


class Clock:
    """Time that passes only when somebody sleeps: loads of the machine cannot disturb a test."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Steps:
    """A counter of a machine that draws `WATT` all the time, told in steps of 20 ms."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self) -> float:
        return WATT * (self.clock.monotonic() // 0.02) * 0.02


def test_a_counter_in_steps_is_read_at_its_steps(monkeypatch):
    """Read at any moment instead, it would be up to 5 J off; polling allows for 0.5 ms twice."""
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    meter = meters.CounterMeter("nvml_counter", Steps(clock))
    for seconds in (0.11, 0.119, 0.155):
        clock.sleep(0.0137)
        meter.start()
        clock.sleep(seconds)
        joule, took = meter.stop(WATT)
        assert took == pytest.approx(seconds)
        assert joule == pytest.approx(WATT * seconds, abs=WATT * 0.001)


def test_samples_are_integrated_over_uneven_gaps(monkeypatch):
    """Power that rises evenly: the trapezoid is exact whatever the moments of the samples."""
    start, moments, seen = time.monotonic(), list[float](), threading.local()

    def now() -> float:
        seen.now = time.monotonic() - start
        moments.append(seen.now)
        return float(seen.now)

    monkeypatch.setattr(meters, "time", SimpleNamespace(monotonic=now))
    meter = meters.SampleMeter("nvml_samples", lambda: 100 + 1000 * seen.now)
    meter.start()
    time.sleep(0.3)
    joule, seconds = meter.stop(0.0)
    assert len(moments) > 3
    assert seconds == moments[-1] - moments[0] >= 0.3
    assert joule == pytest.approx(seconds * (100 + 1000 * (moments[0] + moments[-1]) / 2))


def test_a_run_gives_joules_per_call_and_observations_per_joule(monkeypatch):
    """Calls of 30 ms on a machine that draws 250 W: 7.5 J each, whatever the batch."""
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    monkeypatch.setattr(power, "time", clock)
    meter = meters.CounterMeter("nvml_counter", Steps(clock), limit_watt=500.0)
    seen: list[int] = []

    def call(number: int) -> None:
        seen.append(number)
        clock.sleep(0.03)

    found = power._measure(call, [1, 2, 3], config(batch=4), meter, throughput_hz=100.0)
    assert found.seconds >= 2
    assert found.watt == pytest.approx(WATT, rel=0.02)
    assert found.idle_watt == pytest.approx(WATT, rel=0.1)
    assert found.joule == pytest.approx(WATT * found.seconds / found.calls, rel=0.02)
    assert found.inferences_per_joule == pytest.approx(4 / found.joule)
    assert found.hz_per_watt == pytest.approx(100 / found.watt)
    assert found.hz_per_limit_watt == 0.2
    assert seen[-3:] in ([1, 2, 3], [2, 3, 1], [3, 1, 2])


def test_a_counter_that_stands_still_is_no_energy(monkeypatch):
    for name in ("WARM_S", "IDLE_SETTLE_S", "IDLE_S"):
        monkeypatch.setattr(power, name, 0.01)
    meter = meters.CounterMeter("rapl", lambda: 5.0)
    with pytest.raises(power.NoMeterError, match="rapl stood still"):
        power._measure(lambda _: time.sleep(0.1), [1], config(), meter, 10.0)


def test_rapl_sums_packages_and_nothing_below_them(tmp_path):
    first, second = zone(tmp_path, "0", "package-0", 100), zone(tmp_path, "1", "package-1", 200)
    zone(tmp_path, "0:0", "core", 50)
    zone(tmp_path, "2", "psys", 900)
    meter = cpu.rapl_meter(tmp_path)
    assert meter.limit_watt == 300
    assert meter._read() == pytest.approx(300e-6)
    (first / "energy_uj").write_text("999990")
    assert meter._read() == pytest.approx(1000190e-6)
    (first / "energy_uj").write_text("10")  # round once
    (second / "energy_uj").write_text("300")
    assert meter._read() == pytest.approx(1000310e-6)


@given(st.lists(st.integers(0, 999_999), min_size=1, max_size=30))
def test_a_wrapped_counter_only_grows(steps):
    class File:
        text = "0"

        def read_text(self) -> str:
            return self.text

    file, total = File(), 0
    counter = cpu._Unwrapped(file, 1_000_000)  # type: ignore[arg-type]
    for step in steps:
        total += step
        file.text = str(total % 1_000_000)
        assert counter.read() == pytest.approx(total / 1e6)


def test_without_rapl_there_is_a_reason_and_no_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "POWERCAP", tmp_path)
    phases: list[str] = []
    energy, notes = power.measure(print, [1], config(), CPU, 1.0, phases.append)
    assert energy is None
    assert notes == [f"No energy: this machine has no RAPL counters of its CPU in {tmp_path}."]
    assert phases == []
    power.require(config(), CPU)
    with pytest.raises(RefusedError, match=r"profile\.energy=true.*profile\.energy=auto") as error:
        power.require(config(True), CPU)
    assert error.value.outcome == "unavailable"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_counter_for_root_only_is_said(tmp_path):
    (zone(tmp_path, "0", "package-0", 1) / "energy_uj").chmod(0)
    with pytest.raises(power.NoMeterError, match="energy_uj cannot be read"):
        cpu.rapl_meter(tmp_path)


def test_an_unreadable_counter_is_said(tmp_path):
    (zone(tmp_path, "0", "package-0", 1) / "energy_uj").unlink()
    with pytest.raises(power.NoMeterError, match="energy_uj cannot be read"):
        cpu.rapl_meter(tmp_path)


def amd(drm: Path, unique_id: str, **files: int) -> None:
    device = drm / "renderD128" / "device"
    (device / "hwmon" / "hwmon3").mkdir(parents=True)
    (device / "unique_id").write_text(f"{unique_id}\n")
    for name, value in files.items():
        (device / "hwmon" / "hwmon3" / name).write_text(f"{value}\n")


def test_amd_without_its_library_is_sampled_from_the_kernel(tmp_path, monkeypatch):
    amd(tmp_path, "ab", power1_input=310_000_000, power1_cap=750_000_000)
    monkeypatch.setattr(vendor_amd, "DRM", tmp_path)
    machine = Machine((GPU,), TorchBuild("2.13.0", None, "7.1"), "x", 2, 1)
    with power.open_meter(config(device="rocm"), machine) as meter:
        assert (meter.method, meter.limit_watt) == ("hwmon_samples", 750.0)
        meter.start()
        time.sleep(0.1)
        joule, seconds = meter.stop(0.0)
    assert joule == pytest.approx(310 * seconds)


@pytest.mark.parametrize("uuid", ["GPU-00000000000000ff", "GPU-00000000000000ab"])
def test_amd_is_sampled_from_the_kernel_where_amdsmi_tells_nothing(tmp_path, monkeypatch, uuid):
    """It shows this GPU without its power, as in virtual machines, or not at all."""
    smi = FakeAmdSmi()
    smi.amdsmi_get_power_info = lambda gpu: {}
    monkeypatch.setitem(sys.modules, "amdsmi", smi)
    amd(tmp_path, uuid[-2:], power1_average=310_000_000)
    monkeypatch.setattr(vendor_amd, "DRM", tmp_path)
    machine = Machine((replace(GPU, uuid=uuid),), TorchBuild("2.13.0", None, "7.1"), "x", 2, 1)
    with power.open_meter(config(device="rocm"), machine) as meter:
        assert meter.method == "hwmon_samples"
    assert smi.log == ["init", "shut down"]


@pytest.mark.parametrize(
    ("unique_id", "words"), [("cd", "amdsmi, which"), ("ab", "^hwmon has no power1_av")]
)
def test_amd_that_tells_nothing_is_said(tmp_path, monkeypatch, unique_id, words):
    amd(tmp_path, unique_id)
    monkeypatch.setattr(vendor_amd, "DRM", tmp_path)
    machine = Machine((GPU,), TorchBuild("2.13.0", None, "7.1"), "x", 2, 1)
    with (
        pytest.raises(power.NoMeterError, match=words),
        power.open_meter(config(device="rocm"), machine),
    ):
        pass


def test_an_nvidia_gpu_without_a_driver_is_said():
    gpu = Gpu(0, "GPU-abc", "NVIDIA H100", "nvidia", "sm90", 81_000, "570.1")
    machine = Machine((gpu,), TorchBuild("2.13.0", "13.0", None), "x", 2, 1)
    energy, notes = power.measure(print, [1], config(device="cuda"), machine, 1.0, print)
    assert energy is None
    assert notes[0].startswith("No energy: NVML")
