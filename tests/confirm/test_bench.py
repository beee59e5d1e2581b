"""Promotion with the trial's process replaced by a function: what runs and what is reused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from search_samples import CPU, FakeRun, failed, ok

from openpi_opt import promote
from openpi_opt.config import Config
from openpi_opt.confirm import fresh, summary
from openpi_opt.confirm.bench import Contender, ProcessBench, confirm
from openpi_opt.confirm.fresh import FreshRuns, Planned
from openpi_opt.confirm.promotion import Judged, Wanted
from openpi_opt.criteria import Criteria
from openpi_opt.errors import UserError
from openpi_opt.machine import probe
from openpi_opt.measure.checks import of_gpu
from openpi_opt.result import Gpu, GpuState, Memory, Ok, TrialResult
from openpi_opt.track.fingerprint import fingerprint, fingerprint_hash
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.store import Store

CONTEXT = {"model": {"name": "pi0_mini"}, "platform": {"device": "cpu"}}
PLAIN = Config.parse(CONTEXT).resolved(CPU)
SDPA = Config.parse({**CONTEXT, "attention": {"vision": "sdpa"}}).resolved(CPU)
FUSED = Config.parse({**CONTEXT, "fusion": {"qkv": True}}).resolved(CPU)


# Fresh processes before confirmation: tau of the baseline, then those that show the contenders'
# noise, seven of each of the two.
BEFORE = 8 + 2 * 7


class Noisy:
    """Means around a level for each configuration, other ones at every call."""

    def __init__(self, tau: float = 0.002):
        self.random = np.random.default_rng(0)
        self.tau = tau

    def __call__(self, cfg: Config) -> TrialResult:
        level = 10.0 - 0.5 * len([k for k in cfg.knobs if cfg.knobs[k] != PLAIN.knobs[k]])
        return ok(cfg, level * float(np.exp(self.random.normal(0, self.tau))))


class Promotions:
    """Promotes in one folder, again and again."""

    def __init__(self, folder: Path):
        self.store = Store.open(folder)
        self.said: list[str] = []
        self.paused: list[float] = []
        self.journal = Journal.open(self.store.study_dir("s"))

    def runs(self, run: FakeRun) -> FreshRuns:
        journal = Journal.open(self.store.study_dir("s"))
        return FreshRuns(self.store, journal, None, CPU, self.said.append, run, self.paused.append)

    def __call__(
        self,
        judge: Callable[[Config], TrialResult],
        again: bool = False,
        stale: bool = False,
        judged_by: Criteria | None = None,
        **wanted: object,
    ) -> tuple[Judged, FakeRun, ProcessBench]:
        run = FakeRun(judge)
        runs = self.runs(run)
        mark = "other" if stale else runs.fingerprint_hash(PLAIN)
        found = [
            Contender(
                cfg.hash(), changed=1, order=n, first_ms=9.5, config=cfg, fingerprint_hash=mark
            )
            for n, cfg in enumerate((SDPA, FUSED))
        ]
        request = Wanted(**{"seed": 7, "limit_s": 3600.0, **wanted})  # type: ignore[arg-type]
        with runs.alone(PLAIN):
            bench, judged = confirm(runs, found, request, again, judged_by)
        return judged, run, bench


@pytest.fixture
def promotions(tmp_path):
    return Promotions(tmp_path)


def test_a_finished_promotion_is_answered_without_a_process(promotions):
    judged, run, _ = promotions(Noisy())
    assert judged.winner.subject.key in (SDPA.hash(), FUSED.hash())
    rounds = len(judged.schedule.rounds)
    assert len(run.ran) == BEFORE + 3 * rounds, "then baseline and both finalists in each round"
    second, idle, _ = promotions(Noisy())
    assert idle.ran == []
    assert second == judged


def test_again_measures_anew_and_says_what_that_means(promotions, capsys):
    judged, _, _ = promotions(Noisy())
    capsys.readouterr()
    second, run, bench = promotions(Noisy(), again=True, seed=8)
    assert second.schedule.rounds != judged.schedule.rounds
    assert len(run.ran) == 3 * len(second.schedule.rounds), "the noise of this machine is known"
    assert bench.path.name.endswith("-2.json")
    assert "confirmation 2 of this study" in capsys.readouterr().err


@pytest.mark.parametrize("after", [3, 8, BEFORE, 30])
def test_an_interrupted_promotion_goes_on_where_it_was(promotions, after):
    noisy, left = Noisy(), [after]

    def interrupted(cfg: Config) -> TrialResult:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return noisy(cfg)

    with pytest.raises(KeyboardInterrupt):
        promotions(interrupted)
    kept = promotions.runs(FakeRun(noisy)).journal.records()
    assert len(kept) == after
    judged, run, bench = promotions(noisy, seed=99)
    assert len(run.ran) == BEFORE + 3 * len(judged.schedule.rounds) - after
    order = [key for keys in judged.schedule.rounds for key in keys]
    confirmed = bench.runs.journal.records()[BEFORE:]
    assert [record.result.config_hash for record in confirmed] == order
    assert judged.schedule.seed == (99 if after < BEFORE else 7), (
        "drawn before the interruption or not"
    )


def test_less_time_is_another_schedule_with_runs_of_its_own(promotions):
    """Else a first look could decide whether there is a second."""
    judged, _, _ = promotions(Noisy(0.006), limit_s=600.0)
    longer, run, _ = promotions(Noisy(0.006), limit_s=1200.0)
    assert len(longer.schedule.rounds) > len(judged.schedule.rounds)
    assert len(run.ran) == 3 * len(longer.schedule.rounds), "none of the first's rounds counts"


def test_what_a_process_takes_is_its_work_and_its_share_of_starting(promotions):
    """Four start at once, import for 8 s, and have the device for 3 s one after the other."""
    runs = promotions.runs(FakeRun(Noisy()))
    assert runs.seconds(PLAIN) == 60, "nothing is known"
    own = {"start": 1.0, "import": 7.0, "load": 1.0, "measure": 1.5}
    for number in range(8):
        began, place = 20 * (number // 4), number % 4
        ended = began + 8 + 3 * (place + 1)
        result = ok(PLAIN, 10.0).model_copy(
            update={
                "started_at": f"2026-01-01T00:00:{began:02}+00:00",
                "phase_seconds": {**own, "wait": 3.0 * place, "reference": 0.25},
            }
        )
        at = f"2026-01-01T00:00:{ended:02}Z"
        record = Record(
            uid=f"{number:032x}",
            study="s",
            role="confirm",
            labels={},
            result=result,
            fingerprint_hash="",
            created_at=at,
        )
        runs.journal.append(record)
    # 1.5 s with the device for itself; what is left of 20 s for four is shared
    assert runs.seconds(PLAIN) == pytest.approx(1.5 + (20 - 4 * 1.5) / 4)
    assert runs.seconds(SDPA) == runs.seconds(PLAIN), "by those of another configuration"


def test_a_candidate_that_goes_over_a_limit_is_dropped_and_the_baseline_stays(promotions, capsys):
    """FUSED is the faster one and grows too large in one of its processes."""
    fused = 0

    def judge(cfg: Config) -> TrialResult:
        nonlocal fused
        fused += cfg.hash() == FUSED.hash()
        level = {PLAIN.hash(): 10.0, SDPA.hash(): 9.0, FUSED.hash(): 5.0}[cfg.hash()]
        peak = 900.0 if cfg.is_baseline() or (cfg.hash() == FUSED.hash() and fused == 2) else 400.0
        memory = Memory(peak_mib=peak, device_peak_mib=None, host_peak_mib=peak)
        return ok(cfg, level).model_copy(update={"memory": memory})

    limited = Criteria(limits={"peak_mib": 500.0})
    judged, _, bench = promotions(judge, rounds=4, judged_by=limited)
    assert judged.winner.subject.key == SDPA.hash()
    assert judged.dropped == [FUSED.hash()]
    assert fused == 2, "it is not run again"
    assert bench.over[FUSED.hash()] == {"peak_mib": "900.0 MiB"}
    assert bench.over[PLAIN.hash()]
    assert bench.over[SDPA.hash()] == {}
    assert "over the limit (peak_mib: 900.0 MiB)" in capsys.readouterr().err


def test_a_study_of_another_machine_gives_the_order_only(promotions, capsys):
    judged, run, _ = promotions(Noisy(), stale=True, finalists=1)
    assert "another machine or software" in capsys.readouterr().err
    screened = len(run.ran) - 8 - 2 * len(judged.schedule.rounds)
    assert screened >= 4, "two or more processes of each contender, none of them from the study"


def test_a_baseline_that_failed_once_is_measured_again_by_the_next_command(promotions):
    with pytest.raises(UserError, match="baseline did not end ok"):
        promotions(failed)
    judged, run, _ = promotions(Noisy())
    assert judged.winner is not judged.baseline
    assert len(run.ran) == BEFORE + 3 * len(judged.schedule.rounds)


def test_a_failure_in_confirmation_is_final_until_again(promotions):
    """Else one configuration would run when the others no longer do."""
    noisy = Noisy()
    first, _, _ = promotions(
        lambda cfg: failed(cfg) if cfg.hash() == FUSED.hash() else noisy(cfg), rounds=4
    )
    second, idle, _ = promotions(noisy, rounds=4)
    assert second == first
    assert idle.ran == []
    assert promotions(noisy, rounds=4, again=True)[0].dropped == []


def test_a_damaged_schedule_is_named(promotions):
    _, _, bench = promotions(Noisy(), rounds=3)
    bench.path.write_text("{")
    with pytest.raises(UserError, match=r"schedule-.*damaged"):
        promotions(Noisy(), rounds=3)


def test_a_clock_under_three_quarters_of_its_peak_is_what_throttled_means():
    """By the very check of a trial, whose bound tests/measure/test_checks.py holds to."""
    for mhz, expected in ((0.74 * 1980, True), (0.76 * 1980, False)):
        now = GpuState(sm_clock_mhz=mhz, max_sm_clock_mhz=1980)
        checks = of_gpu(Gpu(before=now, after=now), 1000.0)
        found = ok(PLAIN, 10.0).model_copy(update={"checks": checks})
        assert fresh.throttled(found) is expected
    for other in ("gpu_throttle", "gpu_shared", "drift"):
        assert not fresh.throttled(ok(PLAIN, 10.0, [other]))
    assert not fresh.throttled(failed(PLAIN))


def test_a_throttled_process_is_discarded_and_repeated(promotions):
    seen: list[float] = []

    def hot_at_first(cfg: Config) -> TrialResult:
        seen.append(1000.0 if len(seen) < 2 else 10.0)
        return ok(cfg, seen[-1], ["gpu_clock"] if seen[-1] > 100 else [])

    run = FakeRun(hot_at_first)
    runs = promotions.runs(run)
    with runs.alone(PLAIN):
        _, result = next(runs.in_turn([Planned(PLAIN, "tau 1", ("tau", 0))]))
    assert isinstance(result, Ok)
    assert result.latency.mean_ms == 10.0
    assert len(run.ran) == 3
    assert promotions.paused == [fresh.COOLING_S, 2 * fresh.COOLING_S]
    kept = promotions.runs(run).journal.records()
    assert [r.result.latency.mean_ms for r in kept if isinstance(r.result, Ok)] == [10.0]


def test_a_gpu_that_stays_throttled_ends_it(promotions):
    run = FakeRun(lambda cfg: ok(cfg, 10.0, ["gpu_clock"]))
    runs = promotions.runs(run)
    with runs.alone(PLAIN), pytest.raises(UserError, match="throttled in 4 processes"):
        next(runs.in_turn([Planned(PLAIN, "tau 1", ("tau", 0))]))
    assert len(run.ran) == fresh.MAX_THROTTLED + 1
    assert promotions.runs(run).journal.records() == []


def test_two_promotions_of_a_study_do_not_run_at_once(promotions):
    first, second = (promotions.runs(FakeRun(Noisy())) for _ in range(2))
    with (
        first.alone(PLAIN),
        pytest.raises(UserError, match="another promote"),
        second.alone(PLAIN),
    ):
        pass
    with second.alone(PLAIN):
        pass


def test_what_this_machine_refuses_starts_no_process(promotions):
    run = FakeRun(Noisy())
    graph = Config.parse({**CONTEXT, "graph": {"mode": "manual"}})
    runs = promotions.runs(run)
    with runs.alone(PLAIN):
        _, result = next(runs.in_turn([Planned(graph, "x", ("tau", 0))]))
    assert result.outcome == "unavailable"
    assert run.ran == []


def test_flags_of_what_is_judged_are_said(promotions, capsys):
    def hot(cfg: Config) -> TrialResult:
        return ok(cfg, 10.0, ["gpu_shared"] if cfg.hash() == SDPA.hash() else [])

    judged, _, bench = promotions(hot, rounds=4)
    summary.tell(bench, judged, pipe_width=70)
    captured = capsys.readouterr()
    assert "…" not in captured.out, "no digit is cut where it is narrow"
    assert captured.out.count("10.000 to 10.000") == 3
    assert "flagged gpu_shared: 4 of 12 processes" in captured.err.splitlines()


def test_no_preset_is_written_of_a_baseline_over_a_limit(tmp_path, monkeypatch, capsys):
    """Nothing is faster, and what is as fast is too large."""

    def judge(cfg: Config) -> TrialResult:
        peak = 900.0 if cfg.is_baseline() else 400.0
        memory = Memory(peak_mib=peak, device_peak_mib=None, host_peak_mib=peak)
        return ok(cfg, 10.0).model_copy(update={"memory": memory})

    store = Store.open(tmp_path / "store")
    journal = Journal.open(store.study_dir("s"))
    mark = fingerprint_hash(fingerprint(probe(), PLAIN.platform))
    for each, role in ((PLAIN, "baseline"), (SDPA, "trial")):
        journal.append(Record(study="s", role=role, result=judge(each), fingerprint_hash=mark))
    monkeypatch.setattr(promote, "FreshRuns", partial(promote.FreshRuns, run=FakeRun(judge)))
    command = ["s", "--name", "x", "--store", str(store.path), "--preset-dir", str(tmp_path)]
    command += ["--rounds", "3", "--no-mlflow"]
    assert promote.main([*command, "--limit", "peak_mib=500"]) == 1
    assert "no preset is written" in capsys.readouterr().err
    assert not (tmp_path / "x.yaml").exists()
    assert promote.main(command) == 0, "without a limit the baseline is the simplest"
    provenance = yaml.safe_load((tmp_path / "x.yaml").read_text())["provenance"]
    now = fingerprint(probe(), PLAIN.platform)
    named = ("python", "torch", "triton", "aiter", "openpi_opt", "source_hash")
    assert provenance["versions"] == {name: now[name] for name in named}


def test_the_winner_of_a_tie_is_explained(promotions, capsys):
    """FUSED is a little faster, SDPA came earlier; both change one knob."""
    level = {PLAIN.hash(): 10.0, SDPA.hash(): 9.0}
    fused = iter([8.8, 9.1, 8.8, 9.2, 8.9, 9.1])

    def judge(cfg: Config) -> TrialResult:
        return ok(cfg, level.get(cfg.hash()) or next(fused))

    judged, _, bench = promotions(judge, rounds=6)
    summary.tell(bench, judged)
    said = capsys.readouterr().err
    best = min(judged.candidates, key=lambda c: c.mean_ms)
    assert f"has a smaller mean ({best.mean_ms:.3f} ms)" in said
    assert "a tie, which goes to the one that came earlier in the study" in said
    assert "winner: attention=" in said
    clear = {**level, FUSED.hash(): 8.0}
    judged, _, bench = promotions(lambda cfg: ok(cfg, clear[cfg.hash()]), rounds=7)
    summary.tell(bench, judged)
    assert "with the smallest mean of those that are" in capsys.readouterr().err


def test_a_process_that_other_code_measured_runs_again(tmp_path, monkeypatch):
    sessions, run = Promotions(tmp_path), FakeRun(lambda cfg: ok(cfg, 10.0))

    def session(times: int = 1) -> int:
        runs = sessions.runs(run)
        with runs.alone(PLAIN):
            for _ in range(times):
                next(runs.in_turn([Planned(PLAIN, "x", ("tau", 0))]))
        return len(run.ran)

    assert (session(), session()) == (1, 1)
    monkeypatch.setattr("openpi_opt.confirm.fresh.identity.changes", lambda result: ["a.py"])
    assert session(times=2) == 2, "once, and then it is this session's own"
