"""Studies from Python: the same as the verbs, without an exit."""

import math

import pytest
from quick import QUICK

import openpi_opt
from openpi_opt.errors import UserError

WORDS = ["attention=eager,sdpa,aiter", "tracking=none", *QUICK]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    store = tmp_path_factory.mktemp("api") / "mlruns"
    return openpi_opt.sweep(WORDS, study="s", store=store)


def test_a_sweep_returns_its_study(study):
    trials = study.trials
    assert set(trials["attention"]) == {"eager", "aiter", "sdpa"}
    assert dict(trials["outcome"].value_counts()) == {"ok": 2, "unavailable": 1}
    ok = trials[trials["outcome"] == "ok"]
    assert (ok["mean_ms"] > 0).all()
    assert trials[trials["outcome"] != "ok"]["mean_ms"].isna().all()
    assert study.best is not None
    assert study.best["mean_ms"] == ok["mean_ms"].min()
    assert math.isclose(ok["vs_baseline"].iloc[0], 1.0)


def test_it_can_be_loaded_reported_and_is_called_again_for_nothing(study, tmp_path):
    again = openpi_opt.load_study("s", study.store.path)
    assert again.trials.equals(study.trials)
    assert again.report(tmp_path / "r.html").stat().st_size > 1e6
    known = openpi_opt.sweep(WORDS, study="s", store=study.store.path)
    assert len(known.records) == len(study.records)


def test_errors_are_raised(study, tmp_path):
    with pytest.raises(UserError, match="not in the store"):
        openpi_opt.load_study("absent", study.store.path)
    with pytest.raises(UserError, match="attenton"):
        openpi_opt.sweep(["attenton=eager"], store=tmp_path)
    with pytest.raises(UserError, match="too short"):
        study.promote("p", 0.01, "--preset-dir", str(tmp_path))
