"""Trials as jobs of Slurm, by way of submitit: one job each, so the queue stays everybody's.

submitit is given one function and JSON text. What it pickles on the way lies in the trial's folder
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
from pathlib import Path
from types import FrameType
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError

from openpi_opt.config import Config, Limits
from openpi_opt.engine.display import Display
from openpi_opt.engine.executor import LostError
from openpi_opt.errors import UserError
from openpi_opt.machine import Device
from openpi_opt.process.run import phase_limits
from openpi_opt.remote import node
from openpi_opt.remote.orders import Description, Order, Question
from openpi_opt.space.settings import SlurmSettings

_JOB_FOLDER = "job"
_DESCRIBE_MINUTES = 10
_STARTING_MINUTES = 5
# sacct is not asked more often than this, also for a job that seems gone.
_FORCED_SECONDS = 10.0


class SlurmEngine:
    """Slurm, or submitit's stand-in for it on this host, as an `Engine`."""

    name = "slurm"

    def __init__(self, settings: SlurmSettings):
        """Check that jobs can be submitted from here.

        Raises:
            UserError: this host has no Slurm.
        """
        self._settings = settings
        self._submitting = threading.Lock()
        if settings.cluster == "slurm" and not all(map(shutil.which, ("sbatch", "srun", "sacct"))):
            raise UserError(
                "executor=slurm: this host has no sbatch, srun and sacct on its PATH.\n"
                "Run the sweep on a login node of the cluster."
            )

    def describe(self, question: Question, display: Display, folder: Path) -> list[Description]:
        """Ask one node: a job like those of the trials. Every later one must be equal to it.

        Raises:
            UserError: the job is not taken, or ends without an answer.
        """
        handle = self._submit(_describe, question.dumped(), folder, _DESCRIBE_MINUTES)
        display.note(f"asking a node what it is: job {handle.job_id} of executor=slurm")
        try:
            while not handle.wait(1.0, gone=False):
                pass
            return [Description.model_validate_json(handle.answer())]
        except LostError as error:
            raise UserError(
                f"executor=slurm: job {handle.job_id} did not say what its node is: {error}.\n"
                "It needs openpi_opt with its packages at the same path as here."
            ) from error
        except KeyboardInterrupt:
            handle.cancel()
            raise

    def slots(self, device: Device) -> int:
        """As `executor.slots` says."""
        return self._settings.slots

    def submit(self, order: Order, cfg: Config) -> SlurmHandle:
        """Queue a job with one GPU, or none.

        Raises:
            UserError: Slurm does not take it.
        """
        minutes = self._settings.minutes or _minutes(cfg.limits)
        return self._submit(_run, order.dumped(), order.folder / _JOB_FOLDER, minutes)

    def close(self) -> None:
        """Nothing: jobs end with their trials."""

    def _submit(self, function: Any, text: str, folder: Path, minutes: int) -> SlurmHandle:
        own = self._settings
        slurm = {
            f"slurm_{name}": getattr(own, name)
            for name in ("partition", "account", "qos", "constraint", "nodelist", "exclude", "gres")
        }
        folder.mkdir(mode=0o700, exist_ok=True)  # what it holds is unpickled
        with self._submitting:  # submitit is not made for threads
            executor = submitit.AutoExecutor(folder, cluster=own.cluster)
            executor.update_parameters(
                name="openpi_opt",
                timeout_min=minutes,
                cpus_per_task=own.cpus,
                mem_gb=own.memory_gb,
                gpus_per_node=None if own.gres or not own.gpus else own.gpus,
                **slurm,
            )
            try:
                return SlurmHandle(executor.submit(function, text), own.cluster == "slurm")
            except (FailedSubmissionError, FailedJobError) as error:
                raise UserError(
                    f"executor=slurm: the job was not taken: {_last_line(str(error))}.\n"
                    "See executor.partition, account, qos, gpus, gres and minutes."
                ) from error


class SlurmHandle:
    """One job."""

    def __init__(self, job: submitit.Job[str], queued: bool):
        self._job = job
        self._queued = queued
        self._forced = 0.0
        self._absent = 0

    @property
    def job_id(self) -> str:
        """As `squeue` shows it."""
        return str(self._job.job_id)

    def wait(self, seconds: float, gone: bool) -> bool:
        """Wait for its end. Slurm is asked at once when the process is gone, else rarely.

        submitit waits for what was preempted, but where Slurm is set up to cancel such jobs, or
        has no accounting, only the queue tells that a job does not come again.
        """
        force = gone and time.monotonic() > self._forced + _FORCED_SECONDS
        if self._job.done(force_check=force):
            return True
        if force:
            self._forced = time.monotonic()
            self._absent = self._absent + 1 if self._queued and not self._is_in_queue() else 0
            if self._absent > 1:
                return True
        time.sleep(seconds)
        return False

    def _is_in_queue(self) -> bool:
        """Whether Slurm runs it or will; also when Slurm does not say."""
        asked = subprocess.run(
            ["squeue", "-h", "-j", self.job_id, "-o", "%T"],
            capture_output=True,
            text=True,
            check=False,
        )
        unknown = asked.returncode == 0 or "Invalid job id" in asked.stderr
        return bool(asked.stdout.strip()) or not unknown

    def answer(self) -> str:
        """What it returned.

        Raises:
            LostError: it was cancelled, ran out of time, or its node failed.
            RuntimeError: our own function raised, with its traceback: a defect.
        """
        late = self._queued and self._job.state == "COMPLETED"  # on a shared file system
        if not (late or self._job.paths.result_pickle.exists()):
            raise LostError(f"job {self.job_id} ended {self._job.state} without an answer")
        error = self._job.exception()
        if error is None:
            text = self._job.result()
            shutil.rmtree(self._job.paths.folder, ignore_errors=True)
            return text
        if isinstance(error, UncompletedJobError) or "UncompletedJobError" in str(error):
            raise LostError(f"job {self.job_id} ended {self._job.state} without an answer")
        raise RuntimeError(f"job {self.job_id}: {error}")

    def cancel(self) -> None:
        """Take it out of the queue, or end it; without a queue it runs, and sees by itself."""
        if self._queued:
            self._job.cancel(check=False)


def _describe(question: str) -> str:
    return node.describe(question)


def _run(order: str) -> str:
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


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["no reason given"])[-1][:400]
