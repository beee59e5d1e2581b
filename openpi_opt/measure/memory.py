"""Peak memory of this process: what torch allocated on the device, what is resident on the host."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from openpi_opt.machine import Device
from openpi_opt.result import Memory
from openpi_opt.vendor import BY_DEVICE

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # Linux, Documentation/filesystems/proc.rst: resets VmHWM to the present RSS


def reset_peak(device: Device) -> None:
    """Forget earlier peaks, so that `peak` tells what was reached from here on.

    Call it after loading and before the first call, not after: see `peak` on graphs. Where the
    kernel does not let the host's peak be reset, a RuntimeWarning says that it counts from the
    start of the process.
    """
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError as error:
        warnings.warn(
            f"The host's peak memory counts from the start of the process: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
    if (accelerator := BY_DEVICE[device].accelerator()) is not None:
        accelerator.reset_peak_memory_stats()


def peak(device: Device) -> Memory:
    """Peaks in MiB since `reset_peak`; `peak_mib` is the device's on a GPU, the host's on a CPU.

    The device's peak is `torch.cuda.max_memory_allocated` of the current GPU: bytes in live
    tensors of torch's allocator, without the CUDA context and libraries' workspaces. What a graph
    keeps counts while it is captured only: reset the peak before the capture.

    The host's peak is VmHWM of Linux: resident pages, file-backed ones (libraries, a mapped
    checkpoint) among them.
    """
    host_mib = _host_peak_mib()
    accelerator = BY_DEVICE[device].accelerator()
    device_mib = None if accelerator is None else accelerator.max_memory_allocated() / 2**20
    return Memory(
        peak_mib=host_mib if device_mib is None else device_mib,
        device_peak_mib=device_mib,
        host_peak_mib=host_mib,
    )


def _host_peak_mib() -> float:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no VmHWM line; the host's peak memory is read from it")
    return int(found.group(1)) / 1024
