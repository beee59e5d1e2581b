import time
from typing import Any

import numpy as np
import pytest

from openpi_opt.config import Config
from openpi_opt.machine import AiterPackage, Machine
from openpi_opt.measure import audit, checks
from openpi_opt.measure.stats import summarise
from openpi_opt.result import Check, Compilation, Gpu, GpuState

FINE = GpuState(
    sm_clock_mhz=1900,
    max_sm_clock_mhz=1980,
    power_limit_w=700,
    default_power_limit_w=700,
    throttle_reasons=["sw_power_cap"],
    other_processes=0,
)
CPU = Machine((), None, "AMD EPYC", 2, 24_000)


def by_name(found: list[Check]) -> dict[str, Check]:
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def latency(samples: Any, **more: Any) -> Any:
    values = np.asarray(samples).tolist()
    return summarise(values, values, "device_events", **more)


def quiet(count: int = 100) -> np.ndarray:
    return 16 + np.random.default_rng(0).normal(0, 0.02, count)


def test_a_good_run_has_every_check_and_no_flag():
    found = by_name(
        checks.of_latency(latency(quiet(), asked_rel_ci=0.005, ended="interval"), 5, len(quiet()))
    )
    assert list(found) == [
        "warmup",
        "iterations",
        "inputs",
        "interval",
        "spread",
        "drift",
        "modes",
        "outliers",
        "autocorrelation",
    ]
    assert {check.status for check in found.values()} == {"ok"}


@pytest.mark.parametrize(
    ("samples", "name", "detail"),
    [
        (quiet() * np.linspace(1, 1.03, 100), "drift", "drifting up 3."),
        (np.where(np.arange(100) % 10 < 7, 15.9, 16.8), "modes", "bimodal: 70% at 15.9 ms, 30%"),
        (np.random.default_rng(1).normal(16, 2.5, 100), "spread", "noisy: std is"),
    ],
)
def test_a_bad_run_says_what_it_looks_like(samples, name, detail):
    summary = latency(samples)
    check = by_name(checks.of_latency(summary, 5, 3))[name]
    assert check.status == "flag"
    assert check.detail.startswith(detail)
    assert check.detail in summary.looks


def test_too_few_and_too_wide():
    wide = latency([10.0, 14.0, 10.0, 13.0], asked_rel_ci=0.005, ended="seconds")
    found = by_name(checks.of_latency(wide, 2, 1))
    assert [found[name].status for name in ("warmup", "iterations", "inputs")] == ["flag"] * 3
    assert found["interval"].status == "flag"
    assert "measure.max_seconds reached" in found["interval"].detail
    assert "interval" not in by_name(checks.of_latency(latency(quiet()), 5, 3))


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, "ok"),
        ({"late": 1}, "flag"),
        ({"recompilations": 1}, "flag"),
        ({"graph_breaks": {"print": 2}}, "flag"),
    ],
)
def test_compilation(change, status):
    clean = {"graphs": 3, "recompilations": 0, "graph_breaks": {}, "late": 0}
    found = by_name(checks.of_start(12.0, Compilation(**{**clean, **change})))
    assert found["compilation"].status == status
    assert found["compile_time"].status == found["first_run"].status == "ok"


def test_a_quarter_of_an_hour_is_too_long_and_plain_code_compiles_nothing():
    found = by_name(checks.of_start(901.0, None))
    assert found["compile_time"].status == "flag"
    assert "compilation" not in found
    assert Config.parse({}).limits.compile == checks.COMPILE_LIMIT_S, "a sweep ends it then"


@pytest.mark.parametrize(
    ("change", "name", "status", "detail"),
    [
        ({}, "gpu_clock", "ok", "1900 of 1980 MHz before, 1900 of 1980 MHz after"),
        ({"sm_clock_mhz": 1485.0}, "gpu_clock", "ok", "1485 of 1980"),
        ({"sm_clock_mhz": 1484.0}, "gpu_clock", "flag", "1484 of 1980 MHz after"),
        ({"throttle_reasons": ["sw_thermal_slowdown"]}, "gpu_throttle", "flag", "sw_thermal"),
        ({"throttle_reasons": ["hw_power_brake_slowdown"]}, "gpu_throttle", "flag", "brake"),
        ({"throttle_reasons": []}, "gpu_throttle", "ok", "nothing after"),
        ({"power_limit_w": 500.0}, "gpu_power_limit", "flag", "500 of 700 W after"),
        ({"other_processes": 2}, "gpu_shared", "flag", "2 other process(es) after"),
        (
            {"sm_clock_mhz": None, "not_read": ["sm_clock_mhz: NVML: Not Supported"]},
            "gpu_clock",
            "unknown",
            "not read: sm_clock_mhz: NVML: Not Supported",
        ),
    ],
)
def test_the_gpu_after_the_run(change, name, status, detail):
    after = GpuState(**{**FINE.model_dump(), **change})
    found = by_name(checks.of_gpu(Gpu(before=FINE, after=after), 1000.0))
    assert list(found) == ["gpu_clock", "gpu_throttle", "gpu_power_limit", "gpu_shared"]
    assert found[name].status == status
    assert detail in found[name].detail
    assert {c.status for c in found.values() if c.name != name} == {"ok"}


@pytest.mark.parametrize(("thermal", "status"), [(9.0, "ok"), (11.0, "flag")])
def test_heat_between_the_readings_counts(thermal, status):
    gpu = Gpu(before=FINE, after=FINE, throttled_ms={"thermal": thermal, "power": 900.0})
    found = by_name(checks.of_gpu(gpu, 1000.0))["gpu_throttle"]
    assert found.status == status
    assert (f"for {thermal:.0f} of 1000 ms by heat" in found.detail) == (status == "flag")


def test_waiting_for_a_core(tmp_path):
    schedstat = tmp_path / "schedstat"
    schedstat.write_text("5000000 1000000 12\n")
    wait = checks.HostWait(schedstat)
    schedstat.write_text("9000000 21000000 15\n")
    assert wait.check(1.0).status == "flag"
    assert wait.check(1.0).detail == "kept waiting for a core for 2.0% of the time"
    assert wait.check(4.0).status == "ok"
    schedstat.unlink()
    assert wait.check(1.0).status == "unknown"
    assert checks.HostWait(schedstat).check(1.0).detail.startswith("not read: ")


def test_waiting_of_this_very_thread():
    wait = checks.HostWait()
    began = time.monotonic()
    time.sleep(0.01)
    found = wait.check(time.monotonic() - began)
    assert found.status in ("ok", "flag", "unknown")
    assert found.name == "host_shared"


def cfg(**raw: Any) -> Config:
    return Config.parse({"platform": {"device": "cpu"}, **raw})


def test_environment_as_asked():
    asked = {"GPU_MAX_HW_QUEUES": "2"}

    def of(environ: dict[str, str]) -> Check:
        decisive = [name for name in environ if name != "HOME"]
        found = audit.audit(cfg(), CPU, {"HOME": "/", **environ}, asked, decisive)
        return by_name(found)["environment"]

    assert of(asked).status == "ok"
    assert "GPU_MAX_HW_QUEUES=2" in of(asked).detail
    stray = of({**asked, "TORCHINDUCTOR_MAX_AUTOTUNE": "1"})
    assert (stray.status, stray.detail) == (
        "flag",
        "set, but not by a knob: TORCHINDUCTOR_MAX_AUTOTUNE",
    )
    assert of({}).detail == "not as asked: GPU_MAX_HW_QUEUES"
    other = of({"GPU_MAX_HW_QUEUES": "4"})
    assert "set, but not by a knob" in other.detail
    assert "not as asked" in other.detail


@pytest.mark.parametrize(
    ("value", "nodes", "status"), [("0", 2, "ok"), ("1", 1, "ok"), ("1", 2, "flag")]
)
def test_numa_balancing(tmp_path, value, nodes, status):
    setting = tmp_path / "numa_balancing"
    setting.write_text(f"{value}\n")
    for number in range(nodes):
        (tmp_path / f"node{number}").mkdir()
    assert audit.numa_balancing(setting, tmp_path).status == status
    assert audit.numa_balancing(tmp_path / "absent", tmp_path).status == "unknown"


@pytest.mark.parametrize(
    ("device", "kind", "status"),
    [("rocm", "unrelated", "flag"), ("cuda", "unrelated", "ok"), ("rocm", "amd", "ok")],
)
def test_the_aiter_package(monkeypatch, device, kind, status):
    package = AiterPackage(kind, "0.13", "/site-packages/aiter")
    monkeypatch.setattr("openpi_opt.machine.find_aiter", lambda: package)
    found = audit.audit(
        cfg(platform={"device": device}), Machine((), None, "EPYC", 2, 1), {}, {}, []
    )
    assert by_name(found)["aiter_package"].status == status


def test_inductor_that_autotunes_for_everybody():
    import torch._inductor.config as settings

    plain = cfg(compile={"mode": "default"})
    assert audit.inductor(plain).status == "ok"
    # Not monkeypatch: it would end by deleting the option, and hide it from every later compile.
    with settings.patch(max_autotune=True):
        found = audit.inductor(plain)
    assert found.status == "flag"
    assert found.detail == "max_autotune is on for all, beside compile=default"
