"""What this machine can do at most: measured once, kept in the store, or from a datasheet.

A trial measures in a process of its own (`python -m openpi_opt.measure.ceilings`), in the
environment of the baseline: what the trial's own knobs set must not change the yardstick. This
module imports torch only in there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from openpi_opt import cli
from openpi_opt.config import Config
from openpi_opt.knobs import BY_NAME
from openpi_opt.machine import Device, Machine, probe
from openpi_opt.result import Ceilings, write_atomic
from openpi_opt.vendor import BY_DEVICE, DEVICES, VENDORS

if TYPE_CHECKING:
    import torch

# The child gets this share of the phase's limit: it is ended before the trial itself would be.
_SHARE_OF_LIMIT = 0.8
_LAST_LINES = 3
_GIB = 2**30
_SYSFS_CPU = Path("/sys/devices/system/cpu")


class Measured(BaseModel):
    """A file of the store's folder `ceilings`: which machine and software, when, and what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    key: dict[str, str]
    measured_at: str
    copy_gb_s: float
    read_gb_s: float
    ceilings: Ceilings


def obtain(
    cfg: Config,
    machine: Machine,
    folder: Path,
    env: Mapping[str, str],
    begin: Callable[[], None],
) -> tuple[Ceilings | None, list[str]]:
    """The ceilings for a resolved configuration, and remarks on where they come from.

    Measured ones are read from `folder`, or measured now (`begin` is called first) in a process
    with the environment `env`, and kept there.
    What cannot be measured is replaced by the datasheet's figures, marked as such, or by nothing
    for a device that has none here; the remark says which and why.
    """
    name = device_name(machine, cfg)
    if cfg.profile.roofline == "datasheet":
        found = datasheet(name)
        return found, [] if found else [f"No floor: there is no datasheet here for {name}."]
    key = machine_key(machine, cfg)
    path = folder / f"{_digest(key)}.json"
    known = read(path, key)
    if known is not None:
        return known, []
    begin()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        known = read(path, key)  # another trial may have measured in the meantime
        problem = None if known else _measure_apart(cfg, machine, path, env)
        known = known or read(path, key)
    if known is not None:
        return known, []
    found = datasheet(name)
    instead = "the datasheet's are taken" if found else f"there is no datasheet here for {name}"
    return found, [f"Ceilings could not be measured ({problem}); {instead}."]


def datasheet(name: str) -> Ceilings | None:
    """The vendor's figures for a device, by the name that its driver gives; None if unknown.

    Names count whole: other variants of a model have other clocks.
    """
    sheets = {name: sheet for vendor in VENDORS for name, sheet in vendor.datasheets.items()}
    known = sheets.get(name.removesuffix(" OAM"))
    if known is None:
        return None
    bandwidth, cache, tflops = known
    return Ceilings(
        source="datasheet",
        device=name,
        bandwidth_gb_s=bandwidth,
        tflops=tflops,
        cache_mib=cache,
    )


def device_name(machine: Machine, cfg: Config) -> str:
    """The GPU's name, or the CPU's."""
    if cfg.device == "cpu":
        return machine.cpu
    return machine.gpu(cfg.device, cfg.platform.gpu).name


def machine_key(machine: Machine, cfg: Config) -> dict[str, str]:
    """What a measurement holds for: this very GPU with its driver and torch, or CPU and cores."""
    build = machine.torch
    torch = f"{build.version} cuda={build.cuda} hip={build.hip}" if build else "none"
    if cfg.device == "cpu":
        threads = os.environ.get("OMP_NUM_THREADS", "default")
        return {
            "cpu": machine.cpu,
            "cores": str(machine.cores),
            "omp_num_threads": threads,
            "torch": torch,
        }
    gpu = machine.gpu(cfg.device, cfg.platform.gpu)
    return {"gpu": gpu.uuid, "name": gpu.name, "driver": gpu.driver, "torch": torch}


def read(path: Path, key: Mapping[str, str]) -> Ceilings | None:
    """The ceilings in a file, or None: absent, damaged, or of another machine."""
    try:
        found = Measured.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return found.ceilings if found.key == key else None


def _measure_apart(cfg: Config, machine: Machine, path: Path, env: Mapping[str, str]) -> str | None:
    """Run the measurement in a process of its own; what went wrong, or None."""
    # A permission only; products are TF32 where torch is told so.
    env = {**env, "HIPBLASLT_ALLOW_TF32": "1"}
    command = [sys.executable, "-m", "openpi_opt.measure.ceilings", cfg.device]
    command += ["--key", json.dumps(machine_key(machine, cfg)), "--result", str(path.resolve())]
    limit = cfg.limits.ceilings * _SHARE_OF_LIMIT
    try:
        done = subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {limit:g} s; limits.ceilings gives it more"
    if done.returncode == 0:
        return None
    sys.stderr.write(done.stderr)
    lines = done.stderr.strip().splitlines()[-_LAST_LINES:]
    return f"exit code {done.returncode}: {' '.join(lines)}"[:300]


def _digest(key: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def main(argv: list[str] | None = None) -> int:
    """Measure the current device and write what was found. Runs in a process of its own."""
    arguments = _parser().parse_args(argv)
    device: Device = arguments.device
    machine = probe()
    cfg = Config.parse({"platform": {"device": device}})
    copy, read_only = _bandwidths(device, cache_mib(device, machine) * 2**20)
    found = Ceilings(
        source="measured",
        device=device_name(machine, cfg),
        bandwidth_gb_s=max(copy, read_only),
        tflops={fmt: _tflops(device, fmt) for fmt in _formats(cfg, machine)},
        cache_mib=cache_mib(device, machine),
    )
    document = Measured(
        key=json.loads(arguments.key),
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        copy_gb_s=copy,
        read_gb_s=read_only,
        ceilings=found,
    )
    write_atomic(arguments.result, document.model_dump_json(indent=1) + "\n")
    return 0


def cache_mib(device: Device, machine: Machine) -> float:
    """The last-level cache in MiB: the device's L2, AMD's Infinity Cache, the CPU's L3."""
    if device == "cpu":
        return cpu_cache_bytes(_SYSFS_CPU) / 2**20
    known = datasheet(machine.gpus_for(device)[0].name)
    own: int = BY_DEVICE[device].accelerator().get_device_properties(0).L2_cache_size
    # Of a chiplet GPU the driver tells one chiplet's L2, behind which a larger cache follows.
    return max(own / 2**20, known.cache_mib if known else 0.0)


def cpu_cache_bytes(folder: Path) -> int:
    """Sum of the last-level caches of the cores that this process may use; 0 if not told."""
    found: dict[tuple[int, str], int] = {}
    for core in os.sched_getaffinity(0):
        for index in (folder / f"cpu{core}" / "cache").glob("index*"):
            level = int((index / "level").read_text())
            shared = (index / "shared_cpu_list").read_text().strip()
            found[level, shared] = int((index / "size").read_text().strip().removesuffix("K"))
    last = max((level for level, _ in found), default=0)
    return 1024 * sum(size for (level, _), size in found.items() if level == last)


def _formats(cfg: Config, machine: Machine) -> Iterator[str]:
    """Number formats whose products the device has."""
    yield from ("float32", "bfloat16", "float16")
    if cfg.device == "cpu":
        return  # TF32 is none there, and FP8 a reference
    yield "tf32"
    fp8 = Config.parse({"platform": {"device": cfg.device}, "blas": {"backend": "fp8"}})
    if BY_NAME["blas"].check(fp8, machine) is None:
        yield "fp8"


def _bandwidths(device: Device, cache_bytes: float) -> tuple[float, float]:
    """1e9 bytes per second of a copy (read and written) and of a sum (read only).

    Weights are read only, and some memories do that faster than they copy.
    """
    import torch

    if device == "cpu":
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        size = min(max(_GIB // 4, 4 * int(cache_bytes)), pages // 4)
    else:
        size = min(_GIB, BY_DEVICE[device].accelerator().mem_get_info()[0] // 4)
    kind = BY_DEVICE[device].torch_device
    source = torch.ones(size // 4, dtype=torch.float32, device=kind)
    target = torch.empty_like(source)
    copied = best_seconds(lambda: target.copy_(source), device)
    summed = best_seconds(source.sum, device)
    return 2 * size / copied / 1e9, size / summed / 1e9


def _tflops(device: Device, fmt: str) -> float:
    """1e12 operations per second of a square product of random matrices, the best over sizes."""
    import torch

    torch.set_float32_matmul_precision("high" if fmt == "tf32" else "highest")
    # From such a time on larger products are no faster, and a ceiling is the best that was seen.
    enough, largest = (0.01, 4096) if device == "cpu" else (0.005, 16384)
    if device != "cpu":
        free = BY_DEVICE[device].accelerator().mem_get_info()[0]
        while 5 * 4 * largest**2 > free:
            largest //= 2
    best, size = 0.0, 512
    while size <= largest:
        seconds = best_seconds(_product(size, fmt, BY_DEVICE[device].torch_device), device)
        best = max(best, 2 * size**3 / seconds / 1e12)
        if seconds >= enough:
            break
        size *= 2
    return best


def _product(size: int, fmt: str, kind: str) -> Callable[[], torch.Tensor]:
    import torch

    generator = torch.Generator(kind).manual_seed(0)
    a, b = (torch.randn(size, size, device=kind, generator=generator) for _ in range(2))
    if fmt == "fp8":
        from openpi_opt.kernels import fp8

        dtype = fp8.fp8_dtype(fp8.device_arch(torch.device(kind)))
        one = torch.ones((), device=kind)
        left, right = a.to(dtype), b.to(dtype).t()

        def scaled() -> torch.Tensor:
            return torch._scaled_mm(
                left,
                right,
                scale_a=one,
                scale_b=one,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )

        return scaled
    dtype = torch.float32 if fmt == "tf32" else getattr(torch, fmt)
    a, b = a.to(dtype), b.to(dtype)
    # Weights lie as [out, in], so that is the layout to be fast in.
    return lambda: torch.nn.functional.linear(a, b)


def best_seconds(call: Callable[[], object], device: Device, budget_s: float = 0.15) -> float:
    """The least seconds of one call, after two untimed ones, over at least 5 and `budget_s`.

    A ceiling is the best that was seen: whatever disturbs a call makes it slower.
    """
    accelerator = BY_DEVICE[device].accelerator()
    for _ in range(2):
        call()
    best, count, end = float("inf"), 0, time.monotonic() + budget_s
    while count < 5 or time.monotonic() < end:
        if accelerator is None:
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        else:
            first, last = (accelerator.Event(enable_timing=True) for _ in range(2))
            accelerator.synchronize()
            first.record()
            call()
            last.record()
            accelerator.synchronize()
            seconds = first.elapsed_time(last) / 1e3
        best, count = min(best, seconds), count + 1
    return best


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m openpi_opt.measure.ceilings",
        description="Measure bandwidth and matrix products of this machine's device.",
    )
    parser.add_argument("device", choices=DEVICES)
    parser.add_argument("--key", default="{}", help="JSON object kept with the figures")
    parser.add_argument("--result", type=Path, required=True, help="where the figures go")
    return parser


if __name__ == "__main__":
    cli.run(main, "no result was written")
