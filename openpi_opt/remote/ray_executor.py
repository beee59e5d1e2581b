"""Trials as tasks of a Ray cluster: one GPU each, wherever Ray has one free.

Ray is given one function and an order, and is not asked to run anything again: a trial that was
lost is the sweep's to repeat.
"""

from __future__ import annotations

import logging
import math
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from openpi_opt.engine.display import Display
from openpi_opt.engine.executor import LostError
from openpi_opt.errors import UserError
from openpi_opt.machine import Device
from openpi_opt.process.environment import import_path
from openpi_opt.remote import node
from openpi_opt.remote.node import Description, Order
from openpi_opt.space.settings import RaySettings

_ANSWER_SECONDS = 120.0
_REACH_SECONDS = 10.0
_POLL_SECONDS = 0.5


class RayEngine:
    """A Ray cluster that runs already, as a `remote.Engine`."""

    name = "ray"

    def __init__(self, settings: RaySettings, cpu_slots: int):
        """Connect to it. Raises UserError: there is none at that address."""
        self._settings, self._cpu_slots = settings, cpu_slots
        _reach(settings.address)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address=settings.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                # Workers import this very package, also from a checkout that is not installed.
                runtime_env={"env_vars": import_path({"PYTHONPATH": "${PYTHONPATH}"})},
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise _no_cluster(settings.address, error) from error
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)  # ray puts its own there

    def describe(self, lock: Path, token: str, display: Display) -> list[Description]:
        """Ask every node that has a GPU for a trial; if none has, every one with CPUs."""
        nodes = self._with_gpus() or self._with_cpus()
        if not nodes:
            raise UserError(
                f"executor=ray: no node of the cluster has room for a trial "
                f"(executor.resources={self._settings.resources}, "
                f"executor.cpus={self._settings.cpus})."
            )
        ask, tasks = ray.remote(node.describe), []
        for found in nodes:
            there = NodeAffinitySchedulingStrategy(found["NodeID"], soft=False)
            own = {"num_cpus": 0, "num_gpus": 0, "max_retries": 0, "scheduling_strategy": there}
            tasks.append(ask.options(**own).remote(lock, token))
        try:
            answers: list[Description] = ray.get(tasks, timeout=_ANSWER_SECONDS)
        except ray.exceptions.RayError as error:
            raise LostError(_first_line(error)) from error
        return answers

    def slots(self, device: Device) -> int:
        """What there is room for now, unless `executor.slots` says how many."""
        if self._settings.slots is not None:
            return self._settings.slots
        if device == "cpu":
            return self._cpu_slots * len(self._with_cpus())
        return sum(int(found["Resources"]["GPU"]) for found in self._with_gpus())

    def run(self, order: Order, look: Callable[[], bool]) -> Any:
        """Queue it; Ray starts it where its resources are free, and notices a dead node."""
        device = order.cfg.device
        task = ray.remote(node.run).options(
            num_cpus=self._cpus(device),
            num_gpus=0 if device == "cpu" else 1,
            resources=self._settings.resources or None,
            max_retries=0,
            name=f"trial {order.uid[:12]}",
        )
        reference = task.remote(order)
        try:
            while not ray.wait([reference], timeout=_POLL_SECONDS)[0]:
                look()
        except BaseException:
            ray.cancel(reference)  # out of the queue; where it runs, the node sees by itself
            raise
        try:
            return ray.get(reference)
        except ray.exceptions.OutOfMemoryError as error:
            raise LostError(_first_line(error), outcome="oom") from error
        except ray.exceptions.RayTaskError:
            raise  # of our own function: a defect, with the traceback of the node
        except ray.exceptions.LocalRayletDiedError as error:
            raise UserError(
                f"executor=ray: the cluster is gone ({_first_line(error)}).\n"
                "Start it, then run the same command again to continue."
            ) from error
        except ray.exceptions.RayError as error:
            raise LostError(_first_line(error)) from error

    def close(self) -> None:
        """Disconnect. The cluster goes on."""
        ray.shutdown()

    def _cpus(self, device: Device) -> float:
        """Ray's CPUs for a trial, so that a node takes as many trials as it has devices for."""
        if self._settings.cpus is not None:
            return self._settings.cpus
        if device == "cpu":
            cpus = [found["Resources"]["CPU"] / self._cpu_slots for found in self._with_cpus()]
        else:
            own = [found["Resources"] for found in self._with_gpus()]
            cpus = [each.get("CPU", 0) / each["GPU"] for each in own]
        return math.floor(min(cpus, default=0))

    def _nodes(self, resource: str, least: float) -> list[dict[str, Any]]:
        """Nodes that live and have so much of a resource, and what was asked for."""
        wanted = [*self._settings.resources.items(), (resource, least)]
        return [
            found
            for found in ray.nodes()
            if found["Alive"]
            and all(found["Resources"].get(key, 0) >= amount for key, amount in wanted)
        ]

    def _with_gpus(self) -> list[dict[str, Any]]:
        return self._nodes("GPU", 1)

    def _with_cpus(self) -> list[dict[str, Any]]:
        return self._nodes("CPU", max(self._cpu_slots, self._settings.cpus or 0))


def _reach(address: str) -> None:
    """Refuse HOST:PORT where nothing listens: Ray itself waits for many minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address or not (host and port.isdecimal() and int(port) < 65_536):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UserError:
    said = (str(error).splitlines() or [""])[0]
    return UserError(
        f"executor.address={address}: no Ray cluster there ({said}).\n"
        "Start one (ray start --head, and ray start --address=... on the other nodes), and run "
        "the sweep on one of its nodes."
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:400]
