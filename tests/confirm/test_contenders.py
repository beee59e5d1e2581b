"""Which configurations of a study take part in a promotion."""

import pytest
from search_samples import failed, ok

from openpi_opt.config import Config
from openpi_opt.confirm.bench import contenders
from openpi_opt.criteria import Criteria
from openpi_opt.errors import UserError
from openpi_opt.track.journal import Record

LIMITED = Criteria(limits={"latency_ms": 3.0})
SDPA = {"vision": "sdpa", "prefill": "sdpa", "denoise": "sdpa"}


def record(raw: dict, mean_ms: float | None, role: str = "trial") -> Record:
    cfg = Config.parse({"model": {"name": "pi0_mini"}, "platform": {"device": "cpu"}, **raw})
    result = failed(cfg) if mean_ms is None else ok(cfg, mean_ms)
    return Record(study="s", role=role, result=result, fingerprint_hash="f")  # type: ignore[arg-type]


def test_contenders_are_the_different_right_ones_fastest_first():
    one = {"attention": {"vision": "sdpa"}}
    two = {"attention": {"prefill": "sdpa"}}
    records = [
        record({}, 5.0, "baseline"),
        record({"attention": SDPA}, 4.0),
        record(one, 3.5),
        record(one, 3.0),
        record(two, 1.0, "confirm"),
        record({"graph": {"mode": "manual"}}, None),
    ]
    chosen = contenders(records)
    stages = {"vision", "prefill", "denoise"}
    assert [c.config.knobs["attention"].model_dump(include=stages) for c in chosen] == [
        {"vision": "sdpa", "prefill": "eager", "denoise": "eager"},
        SDPA,
    ]
    assert [c.first_ms for c in chosen] == [3.0, 4.0], "the newest measurement of each"


def test_only_the_baseline_ok_leaves_the_baseline():
    (only,) = contenders([record({}, 5.0, "baseline"), record({"graph": {"mode": "manual"}}, None)])
    assert only.config.is_baseline()


def test_lossy_configurations_compete_only_when_asked():
    records = [record({}, 5.0), record({"attention": SDPA}, 4.0)]
    records.append(record({"blas": {"backend": "fp8"}}, 1.0))
    assert [c.config.lossy() for c in contenders(records)] == [False]
    assert [c.config.lossy() for c in contenders(records, allow_lossy=True)] == [True, False]


def test_what_is_over_a_limit_does_not_compete():
    records = [record({}, 5.0, "baseline"), record({"attention": SDPA}, 4.0)]
    records.append(record({"attention": {"vision": "sdpa"}}, 1.0))
    assert [c.first_ms for c in contenders(records, criteria=LIMITED)] == [1.0]
    too_low = Criteria(limits={"latency_ms": 0.5})
    with pytest.raises(UserError, match=r"none of the 2 configurations .*latency_ms=0\.5"):
        contenders(records, criteria=too_low)


def test_a_limit_of_the_sweeps_day_ends_no_confirmation():
    """Else `pruning` would end the baseline, which is there to compare with."""
    limited = {"limits": {"latency_ms": 3.0, "peak_mib": 9.0}}
    for records in ([record({"attention": SDPA, **limited}, 2.0)], [record(limited, 2.0)]):
        (only,) = contenders(records)
        assert only.config.limits.latency_ms is None
        assert only.config.limits.peak_mib == 9.0


def test_a_study_without_an_ok_trial_is_refused():
    with pytest.raises(UserError, match="no trial with outcome ok"):
        contenders([record({}, None)])


def test_different_contexts_are_not_compared():
    records = [record({}, 5.0), record({"workload": {"batch_size": 2}}, 1.0)]
    with pytest.raises(UserError, match="cannot be compared"):
        contenders(records)
