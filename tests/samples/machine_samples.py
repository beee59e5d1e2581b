"""Machines, and configurations resolved for them, for tests of what runs where."""

from openpi_opt.config import Config
from openpi_opt.machine import AiterPackage, Gpu, Machine, TorchBuild

CPU = Machine((), TorchBuild("2.13.0+cpu", None, None), "x", 2, 1)


def machine(arch: str, aiter: AiterPackage | None = None) -> Machine:
    """A machine with one GPU of this architecture: smNN or gfxNNN."""
    amd = arch.startswith("gfx")
    gpu = Gpu(0, "GPU-1", arch, "amd" if amd else "nvidia", arch, 80_000, "1")
    build = TorchBuild("2.13.0", None if amd else "13.0", "7.1" if amd else None)
    found = Machine((gpu,), build, "x", 2, 1)
    found.__dict__["aiter"] = aiter
    return found


H100, A100, T4 = machine("sm90"), machine("sm80"), machine("sm75")
AMD_AITER = AiterPackage("amd", "0.1.20", "/nowhere/aiter")
MI300X, MI350 = machine("gfx942", AMD_AITER), machine("gfx950", AMD_AITER)


def config(raw: dict, on: Machine = CPU) -> Config:
    """`raw` for the small model, resolved for a machine."""
    return Config.parse({"model": {"name": "pi0_mini"}, **raw}).resolved(on)
