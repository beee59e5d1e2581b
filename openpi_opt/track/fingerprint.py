"""Which machine and software gave a number: recorded with every result, hashed for comparing.

Everything is read from package metadata, `/proc` and git, in well under 100 ms: neither torch nor
any other heavy package is imported. The host's name and user are left out: records get shared.
"""

from __future__ import annotations

import hashlib
import json
import platform as python_platform
import subprocess
from collections.abc import Mapping
from typing import Any

from openpi_opt.config import Platform
from openpi_opt.machine import TRITON, Gpu, Machine, installed
from openpi_opt.paths import package_dir

_GIT_TIMEOUT_S = 5


def fingerprint(machine: Machine, platform: Platform | None = None) -> dict[str, Any]:
    """Describe what runs a trial. `platform` (resolved, without `auto`) says which of the machine's
    GPUs it is; without it, the first one that the installed torch can use. On the CPU `gpu` is
    None, whatever is installed."""
    gpu = _gpu(machine, platform)
    torch, aiter = machine.torch, machine.aiter
    return {
        "gpu": gpu and described(gpu),
        "cpu": machine.cpu,
        "cores": machine.cores,
        "memory_mib": machine.memory_mib,
        "os": f"{python_platform.system()} {python_platform.release()}",
        "python": python_platform.python_version(),
        "torch": torch and {"version": torch.version, "cuda": torch.cuda, "hip": torch.hip},
        "triton": installed(*TRITON),
        "aiter": aiter and {"kind": aiter.kind, "version": aiter.version},
        "optuna": installed("optuna"),
        "mlflow": installed("mlflow", "mlflow-skinny"),
        "openpi_opt": package_version(),
        "git": git_revision(),
        "source_hash": source_hash(),
    }


def described(gpu: Gpu) -> dict[str, Any]:
    """The part of a fingerprint that says which GPU it is."""
    return {
        "name": gpu.name,
        "uuid": gpu.uuid,
        "arch": gpu.arch,
        "memory_mib": gpu.memory_mib,
        "driver": gpu.driver,
    }


def fingerprint_hash(fp: Mapping[str, Any]) -> str:
    """Hash, 12 hexadecimal digits, of the machine and software that change the numbers.

    In: GPU model, architecture and driver; CPU model; torch with the GPU runtime it was built for;
    triton; aiter. Out: the GPU's UUID and the amount of memory and cores (equal machines of a fleet
    are to share results), the kernel, Python, Optuna and MLflow (they are not in the measured
    call), and this package, of which every result names the files that its trial imported
    (`track.identity`).
    """
    text = json.dumps(decisive(fp), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def decisive(fp: Mapping[str, Any]) -> dict[str, str]:
    """The part of a fingerprint that `fingerprint_hash` covers, as short texts."""
    gpu, torch, aiter = (fp.get(key) or {} for key in ("gpu", "torch", "aiter"))
    return {
        "gpu": " ".join(str(gpu[key]) for key in ("name", "arch", "driver")) if gpu else "none",
        "cpu": str(fp.get("cpu")),
        "torch": " ".join(f"{key}={torch[key]}" for key in sorted(torch)) or "none",
        "triton": str(fp.get("triton")),
        "aiter": f"{aiter['kind']} {aiter['version']}" if aiter else "none",
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What tells two fingerprints apart, as `what: old -> new`."""
    before, after = decisive(old), decisive(new)
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]


def package_version() -> str:
    """Version of openpi_opt; `unknown` when it runs from a folder that was never installed."""
    return installed("openpi_opt") or "unknown"


def source_hash() -> str:
    """SHA-256, 12 hexadecimal digits, over all Python files of the package, with their paths."""
    root = package_dir()
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def _gpu(machine: Machine, platform: Platform | None) -> Gpu | None:
    if platform is None or platform.device == "auto":
        platform = Platform(device=machine.usable_device())
    try:
        return machine.gpu(platform.device, platform.gpu)
    except IndexError:
        return None


def git_revision() -> str | None:
    """Revision of the checkout that holds the package, `-dirty` behind it when edited. None for an
    installed package: a repository further up is somebody else's."""
    checkout = package_dir().parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=_GIT_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here, or it hangs on a dead network disk
        return None
    return done.stdout.strip() or None
