"""The environment audit: what around a trial changes its numbers and is not in its configuration.

Read before torch is imported; nothing here needs a GPU. The AMD guide and the field's MI300X and
MI350 work name the items: NUMA balancing, variables that select kernels or tuning, an autotuning
default set by the container, the unrelated `aiter` package.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from openpi_opt.config import Config
from openpi_opt.machine import Machine
from openpi_opt.result import Check
from openpi_opt.vendor import BY_DEVICE

_NUMA_BALANCING = Path("/proc/sys/kernel/numa_balancing")
_NODES = Path("/sys/devices/system/node")
_AUTOTUNING = ("max_autotune", "max_autotune_gemm", "max_autotune_pointwise")


def audit(
    cfg: Config,
    machine: Machine,
    environ: Mapping[str, str],
    asked: Mapping[str, str],
    decisive: Iterable[str],
) -> list[Check]:
    """All items that can be read before torch is imported.

    `asked` is what the knobs of `cfg` set; `decisive` are the names in `environ` that change what
    a trial measures (`search.environment` knows both).
    """
    return [_variables(environ, asked, decisive), numa_balancing(), _aiter(cfg, machine)]


def numa_balancing(setting: Path = _NUMA_BALANCING, nodes: Path = _NODES) -> Check:
    """Whether the kernel moves pages between NUMA nodes while a trial runs."""
    name = "numa_balancing"
    try:
        value = setting.read_text(encoding="ascii").strip()
    except OSError as error:
        return Check(name=name, status="unknown", detail=f"not read: {error}")
    count = len(list(nodes.glob("node[0-9]*")))
    if value == "0" or count < 2:
        return Check(name=name, status="ok", detail=f"set to {value} on {count} NUMA node(s)")
    return Check(
        name=name,
        status="flag",
        detail=f"on, over {count} NUMA nodes: the kernel moves pages meanwhile; "
        "sysctl kernel.numa_balancing=0 turns it off",
    )


def inductor(cfg: Config) -> Check:
    """Whether Inductor autotunes without having been asked; to be called when the call ran.

    A container that sets autotuning for everybody turns 2 minutes of compiling into 15.
    """
    name = "inductor_autotune"
    settings = sys.modules.get("torch._inductor.config")
    if settings is None:
        return Check(name=name, status="ok", detail="Inductor was not used")
    # By torch's import rules a configuration module may keep values of earlier versions.
    on = [key for key in _AUTOTUNING if getattr(settings, key, False)]
    if not on:
        return Check(name=name, status="ok", detail="off unless the configuration asks for it")
    mode = cfg.knobs["compile"].model_dump()["mode"]
    return Check(
        name=name, status="flag", detail=f"{', '.join(on)} is on for all, beside compile={mode}"
    )


def _variables(
    environ: Mapping[str, str], asked: Mapping[str, str], decisive: Iterable[str]
) -> Check:
    """A trial's environment holds what its knobs set; more can come in where it is made by hand."""
    name = "environment"
    stray = [key for key in decisive if asked.get(key) != environ[key]]
    missing = [key for key, value in asked.items() if environ.get(key) != value]
    if stray or missing:
        detail = "; ".join(
            f"{what}: {', '.join(keys)}"
            for what, keys in (("set, but not by a knob", stray), ("not as asked", missing))
            if keys
        )
        return Check(name=name, status="flag", detail=detail)
    said = " ".join(f"{key}={value}" for key, value in asked.items()) or "no variable of a knob"
    return Check(name=name, status="ok", detail=f"{said}, no other that changes a trial")


def _aiter(cfg: Config, machine: Machine) -> Check:
    name, found = "aiter_package", machine.aiter
    if found is None or found.kind == "amd":
        text = "not installed" if found is None else f"AMD's, {found.version}"
        return Check(name=name, status="ok", detail=text)
    # On other devices nothing would use either.
    status = "flag" if BY_DEVICE[cfg.device].has_aiter else "ok"
    text = f"{found.location} is the unrelated asyncio package of that name ({found.version})"
    return Check(name=name, status=status, detail=text)
