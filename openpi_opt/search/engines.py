"""The engine that `executor` names. What it needs is imported only when it is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from openpi_opt.errors import UserError
from openpi_opt.search.remote import Engine
from openpi_opt.search.settings import ExecutorSettings, RaySettings, SlurmSettings

_T = TypeVar("_T")


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
        from openpi_opt.search.ray_executor import RayEngine

        return _needs("ray", "ray", lambda: RayEngine(settings, cpu_slots))
    if isinstance(settings, SlurmSettings):
        from openpi_opt.search.slurm_executor import SlurmEngine

        return _needs("slurm", "submitit", lambda: SlurmEngine(settings))
    return None


def _needs(kind: str, package: str, make: Callable[[], _T]) -> _T:
    try:
        return make()
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise UserError(
            f"executor={kind} needs the package {package}, which is not installed.\n"
            f"Install it on this host and on the nodes: pip install 'openpi_opt[{kind}]'"
        ) from error
