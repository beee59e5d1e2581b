import warnings

import numpy as np
import pytest
import torch

from openpi_opt.measure import memory
from openpi_opt.measure.memory import peak, reset_peak

MIB = 2**20


@pytest.fixture
def resettable():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            reset_peak("cpu")
        except RuntimeWarning as warning:
            pytest.skip(str(warning))


@pytest.mark.usefixtures("resettable")
def test_host_peak_rises_and_is_forgotten():
    reset_peak("cpu")
    before = peak("cpu").host_peak_mib
    block = np.ones(200 * MIB // 8)
    with_block = peak("cpu").host_peak_mib
    del block
    after = peak("cpu").host_peak_mib
    reset_peak("cpu")

    assert 190 < with_block - before < 260
    assert after == pytest.approx(with_block, abs=5)
    assert peak("cpu").host_peak_mib < after - 150


def test_peak_of_a_cpu_is_the_hosts():
    found = peak("cpu")
    assert found.device_peak_mib is None
    assert found.peak_mib == found.host_peak_mib > 50


def test_peak_of_a_gpu_is_the_devices(monkeypatch):
    resets: list[str] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append("device"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * MIB // 2)

    reset_peak("rocm")
    found = peak("rocm")

    assert resets == ["device"]
    assert found.peak_mib == found.device_peak_mib == 1.5
    assert found.host_peak_mib > 50


def test_a_peak_that_cannot_be_reset_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    with pytest.warns(RuntimeWarning, match="counts from the start of the process"):
        reset_peak("cpu")


def test_kibibytes_become_mebibytes(monkeypatch, tmp_path):
    status = tmp_path / "status"
    status.write_text("VmPeak:\t 9999 kB\nVmHWM:\t    2560 kB\nVmRSS:\t 1 kB\n", encoding="ascii")
    monkeypatch.setattr(memory, "_STATUS", status)
    assert peak("cpu").host_peak_mib == 2.5

    status.write_text("VmPeak:\t 9999 kB\n", encoding="ascii")
    with pytest.raises(OSError, match="no VmHWM"):
        peak("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_peak_counts_tensors_that_are_gone():
    reset_peak("cuda")
    before = peak("cuda").peak_mib
    block = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    del block
    assert peak("cuda").peak_mib - before == pytest.approx(64, abs=2)
