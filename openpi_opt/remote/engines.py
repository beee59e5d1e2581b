"""The engine that `executor` names. What it needs is imported only when it is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from openpi_opt.errors import UserError
from openpi_opt.remote.remote import Engine
from openpi_opt.space.settings import ExecutorSettings, RaySettings, SlurmSettings


@contextmanager
def connected(settings: ExecutorSettings, cpu_slots: int = 1) -> Iterator[Engine | None]:
    """The engine, let go of at the end; None for this host alone.

    Raises:
        UserError: its package is missing, or it cannot be reached.
    """
    engine = _open(settings, cpu_slots)
    try:
        yield engine
    finally:
        if engine is not None:
            engine.close()


def _open(settings: ExecutorSettings, cpu_slots: int) -> Engine | None:
    if isinstance(settings, RaySettings):
        with _needs("ray", "ray"):
            from openpi_opt.remote.ray_executor import RayEngine
        return RayEngine(settings, cpu_slots)
    if isinstance(settings, SlurmSettings):
        with _needs("slurm", "submitit"):
            from openpi_opt.remote.slurm_executor import SlurmEngine
        return SlurmEngine(settings)
    return None


@contextmanager
def _needs(kind: str, package: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise UserError(
            f"executor={kind} needs the package {package}, which is not installed.\n"
            f"Install it on this host and on the nodes: pip install 'openpi_opt[{kind}]'"
        ) from error
