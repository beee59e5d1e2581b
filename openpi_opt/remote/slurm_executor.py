"""Trials as jobs of Slurm, by way of submitit: one job each, so the queue stays everybody's.

submitit is given one function and an order. What it pickles on the way lies in the trial's folder
`job`, which belongs to the user who sweeps. A job that Slurm preempts or requeues begins again with
the same order, as long as the sweep wants it.
"""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

from openpi_opt.config import Limits
from openpi_opt.engine.display import Display
from openpi_opt.engine.executor import LostError
from openpi_opt.errors import UserError
from openpi_opt.machine import Device
from openpi_opt.process.run import phase_limits
from openpi_opt.remote import node
from openpi_opt.remote.node import Description, Order
from openpi_opt.space.settings import SlurmSettings

_DESCRIBE_MINUTES = 10
_STARTING_MINUTES = 5
_POLL_SECONDS = 0.5
# sacct is not asked more often than this, also for a job that seems gone.
_FORCED_SECONDS = 10.0


class SlurmEngine:
    """Slurm, or submitit's stand-in for it on this host, as a `remote.Engine`."""

    name = "slurm"

    def __init__(self, settings: SlurmSettings):
        """Check that jobs can be submitted from here. Raises UserError: this host has no Slurm."""
        self._settings, self._queued = settings, settings.cluster == "slurm"
        self._submitting = threading.Lock()
        if self._queued and not all(map(shutil.which, ("sbatch", "srun", "sacct"))):
            raise UserError(
                "executor=slurm: this host has no sbatch, srun and sacct on its PATH.\n"
                "Run the sweep on a login node of the cluster."
            )

    def describe(self, lock: Path, token: str, display: Display) -> list[Description]:
        """Ask one node: a job like those of the trials. Every later one must be equal to it."""
        job = self._submit(lock.parent, _DESCRIBE_MINUTES, node.describe, lock, token)
        display.note(f"asking a node what it is: job {job.job_id} of executor=slurm")
        return [self._answer(job, lambda: False)]

    def slots(self, device: Device) -> int:
        """As `executor.slots` says."""
        return self._settings.slots

    def run(self, order: Order, look: Callable[[], bool]) -> Any:
        """Queue a job with one GPU, or none."""
        minutes = self._settings.minutes or _minutes(order.cfg.limits)
        job = self._submit(order.folder / "job", minutes, _run, order)
        answer = self._answer(job, look)
        shutil.rmtree(order.folder / "job", ignore_errors=True)
        return answer

    def close(self) -> None:
        """Nothing: jobs end with their trials."""

    def _submit(self, folder: Path, minutes: int, function: Any, *given: Any) -> Any:
        own = self._settings
        names = ("partition", "account", "qos", "constraint", "nodelist", "exclude", "gres")
        folder.mkdir(mode=0o700, exist_ok=True)  # what it holds is unpickled
        with self._submitting:  # submitit is not made for threads
            executor = submitit.AutoExecutor(folder, cluster=own.cluster)
            executor.update_parameters(
                name="openpi_opt",
                timeout_min=minutes,
                cpus_per_task=own.cpus,
                mem_gb=own.memory_gb,
                gpus_per_node=None if own.gres or not own.gpus else own.gpus,
                **{f"slurm_{name}": getattr(own, name) for name in names},
            )
            try:
                return executor.submit(function, *given)
            except (FailedSubmissionError, FailedJobError) as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                raise UserError(
                    "executor=slurm: the job was not taken: "
                    f"{(lines or ['no reason given'])[-1][:400]}.\n"
                    "See executor.partition, account, qos, gpus, gres and minutes."
                ) from error

    def _answer(self, job: Any, look: Callable[[], bool]) -> Any:
        """Wait for the end of a job; what it returned."""
        try:
            self._wait(job, look)
        except BaseException:
            if self._queued:  # else it runs, and sees by itself
                job.cancel(check=False)
            raise
        late = self._queued and job.state == "COMPLETED"  # on a shared file system
        there = late or job.paths.result_pickle.exists()
        error = job.exception() if there else None
        if there and error is None:
            return job.result()
        ended_it = isinstance(error, UncompletedJobError) or "UncompletedJobError" in str(error)
        if not there or ended_it:
            raise LostError(f"job {job.job_id} ended {job.state} without an answer")
        raise RuntimeError(f"job {job.job_id}: {error}")

    def _wait(self, job: Any, look: Callable[[], bool]) -> None:
        """Wait for its end. Slurm is asked at once when the process is gone, else rarely.

        submitit waits for what was preempted, but where Slurm is set up to cancel such jobs, or
        has no accounting, only the queue tells that a job does not come again.
        """
        forced, absent = 0.0, 0
        while absent < 2:
            force = look() and time.monotonic() > forced + _FORCED_SECONDS
            if job.done(force_check=force):
                return
            if force:
                forced = time.monotonic()
                absent = absent + 1 if self._queued and not _is_in_queue(job) else 0
            else:
                time.sleep(_POLL_SECONDS)


def _is_in_queue(job: Any) -> bool:
    """Whether Slurm runs it or will; also when Slurm does not say."""
    asked = subprocess.run(
        ["squeue", "-h", "-j", str(job.job_id), "-o", "%T"],
        capture_output=True,
        text=True,
        check=False,
    )
    unknown = asked.returncode == 0 or "Invalid job id" in asked.stderr
    return bool(asked.stdout.strip()) or not unknown


def _run(order: Order) -> Any:
    """Carry out an order in a job. Slurm's SIGTERM, and submitit's own signal, end the trial."""
    signal.signal(signal.SIGTERM, _interrupt)
    return node.run(order)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End without an answer, so that a job that is requeued is waited for."""
    raise KeyboardInterrupt


def _minutes(limits: Limits) -> int:
    """Longest time of a trial by the limits of its phases, in whole minutes."""
    seconds = sum(limit for limit in phase_limits(limits).values() if math.isfinite(limit))
    return math.ceil(seconds / 60) + _STARTING_MINUTES
