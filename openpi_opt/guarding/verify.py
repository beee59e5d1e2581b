"""The guard for a policy that is handed out: `load_policy(..., verify=True)`.

A preset was guarded with the model, weights and workload of its study. With other ones, on another
machine, or after a change of torch, it is a combination that nothing ever looked at. What passed is
remembered in the store, under everything that decides it.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from openpi_opt import runtime
from openpi_opt.config import Config
from openpi_opt.errors import RefusedError, UserError
from openpi_opt.guarding import question, reference, structure
from openpi_opt.machine import Machine
from openpi_opt.measure import guard
from openpi_opt.result import GuardReport, write_atomic

_LOG = logging.getLogger(__name__)


def passed_before(cfg: Config, machine: Machine, folder: Path) -> bool:
    """Whether this combination passed on this kind of machine, with this program."""
    return _path(cfg, machine, folder).exists()


def ask_first(cfg: Config, machine: Machine, folder: Path) -> question.Question:
    """Reference and structure, before the policy itself is built: its memory is free for them.

    Raises UserError: the structure is wrong, or the plain policy overflows in this precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = runtime.torch_device(cfg)
    started = time.monotonic()
    try:
        asked = question.ask(runtime.build_policy(cfg, device), cfg, _arch(cfg, machine), folder)
    except RefusedError as refusal:
        raise UserError(f"verify: {refusal.reason}") from None
    seen = asked.known_structure(foreign=True) or asked.structure()
    asked = asked.knowing(seen)
    if not seen.passed:
        raise _refused(asked.wrong_structure())
    _LOG.info("verify: structure after %.1f s", time.monotonic() - started)
    return asked


def ask_policy(
    asked: question.Question, prepared: runtime.Prepared, machine: Machine
) -> GuardReport:
    """The policy at its own precision; passing is remembered.

    Raises UserError: its actions are wrong.
    """
    report = asked.check(prepared.call, prepared.policy.layout)
    if not report.passed:
        raise _refused(report)
    write_atomic(_path(asked.cfg, machine, asked.folder), report.model_dump_json(indent=1))
    return report


def _refused(report: GuardReport) -> UserError:
    return UserError(
        f"verify: {guard.explain(report)}.\n"
        "This policy is not handed out. Load the baseline (preset=None), or run the same "
        "configuration by `python -m openpi_opt.sweep` to see more; verify=False skips the guard."
    )


def _arch(cfg: Config, machine: Machine) -> str:
    gpus = machine.gpus_for(cfg.device)
    return gpus[cfg.platform.gpu or 0].arch if gpus else machine.cpu


def _path(cfg: Config, machine: Machine, folder: Path) -> Path:
    parts = [
        cfg.hash(),
        reference.key(cfg, _arch(cfg, machine), folder),
        structure.program_hash(),
    ]
    return folder / f"verified-{reference.digest(parts)}.json"
