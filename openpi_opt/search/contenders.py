"""Who of a study takes part in a promotion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.result import Ok
from openpi_opt.track.journal import Record


@dataclass(frozen=True)
class Contender:
    """A configuration of the study with its newest measurement there."""

    config: Config
    number: int
    mean_ms: float
    fingerprint_hash: str


def contenders(records: Sequence[Record], allow_lossy: bool = False) -> list[Contender]:
    """The different configurations of a study that are right, fastest first, without the baseline.

    Lossy ones (FP8) do not compete with the others unless `allow_lossy`. When only the baseline
    itself was `ok`, it is the only element.

    Raises:
        UserError: no trial is `ok`, or the trials belong to different contexts.
    """
    ok = [(r, r.result) for r in records if isinstance(r.result, Ok) and r.role != "confirm"]
    if not ok:
        raise UserError(
            "this study has no trial with outcome ok, so there is nothing to promote. "
            "`python -m openpi_opt.compare STUDY` shows the reasons."
        )
    contexts = {result.context_hash for _, result in ok}
    if len(contexts) > 1:
        raise UserError(
            f"this study holds {len(contexts)} different models, workloads or platforms, whose "
            "latencies cannot be compared. Sweep one of them in a study of its own."
        )
    newest: dict[str, Contender] = {}
    for record, result in ok:
        cfg = Config.load(result.config)
        if not cfg.is_baseline() and (allow_lossy or not cfg.lossy()):
            newest[cfg.hash()] = Contender(
                cfg, record.number, result.latency.mean_ms, record.fingerprint_hash
            )
    record, result = ok[0]
    plain = Config.load(result.config).baseline()
    return sorted(newest.values(), key=lambda c: c.mean_ms) or [
        Contender(plain, record.number, result.latency.mean_ms, record.fingerprint_hash)
    ]


def short(cfg: Config) -> str:
    """The knobs that differ from the baseline, with their labels."""
    plain = cfg.baseline().labels()
    changed = {k: v for k, v in cfg.labels().items() if v != plain[k]}
    return " ".join(f"{k}={v}" for k, v in changed.items()) or "baseline"
