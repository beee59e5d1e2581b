"""Who of a study takes part in a promotion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openpi_opt.config import Config
from openpi_opt.criteria import Criteria
from openpi_opt.errors import UserError
from openpi_opt.result import Ok
from openpi_opt.track import identity
from openpi_opt.track.journal import Record


@dataclass(frozen=True)
class Contender:
    """A configuration of the study with its newest measurement there."""

    config: Config
    number: int
    mean_ms: float
    fingerprint_hash: str
    changed: tuple[str, ...] = ()  # of the package since it was measured


def contenders(
    records: Sequence[Record], allow_lossy: bool = False, criteria: Criteria | None = None
) -> list[Contender]:
    """The different configurations of a study that are right, best first, without the baseline.

    The best is the least of the study's objective, or of the mean latency where it has several.

    Lossy ones (FP8) do not compete with the others unless `allow_lossy`, and those above a limit of
    `criteria` not at all. When only the baseline itself was `ok`, it is the only element.

    Raises:
        UserError: no trial is `ok`, none keeps the limits, or the trials belong to different
            contexts.
    """
    criteria = (criteria or Criteria()).allowing(allow_lossy)
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
    over: dict[str, bool] = {}  # by its newest measurement
    order: dict[str, float] = {}
    first = criteria.figures()[0]
    for record, result in ok:
        cfg = _unlimited(Config.load(result.config))
        if not cfg.is_baseline() and (criteria.allow_lossy or not cfg.lossy()):
            config_hash = cfg.hash()
            newest[config_hash] = Contender(
                *(cfg, record.number, result.latency.mean_ms, record.fingerprint_hash),
                changed=tuple(identity.changes(result)),
            )
            order[config_hash] = result.latency.mean_ms if criteria.several else first.value(result)
            over[config_hash] = bool(criteria.over(result))
    within = sorted((key for key in newest if not over[key]), key=order.__getitem__)
    if newest and not within:
        raise UserError(
            f"none of the {len(newest)} configurations of this study keeps its limits "
            f"({criteria.limits_text()}), so there is nothing to promote.\n"
            "promote takes another one with --limit NAME=VALUE; the sweep with another one judges "
            "the same results anew. Or sweep further."
        )
    record, result = ok[0]
    plain = _unlimited(Config.load(result.config)).baseline()
    return [newest[key] for key in within] or [
        Contender(plain, record.number, result.latency.mean_ms, record.fingerprint_hash)
    ]


def _unlimited(cfg: Config) -> Config:
    """The same, measured to its end however slow: the limit was that day's, or of `pruning`."""
    return cfg.model_copy(update={"limits": cfg.limits.model_copy(update={"latency_ms": None})})


def short(cfg: Config) -> str:
    """The knobs that differ from the baseline, with their labels."""
    plain = cfg.baseline().labels()
    changed = {k: v for k, v in cfg.labels().items() if v != plain[k]}
    return " ".join(f"{k}={v}" for k, v in changed.items()) or "baseline"
