"""`pairs`: rounds, resuming, the end by time, the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from search_samples import CPU, failed, ok

from openpi_opt import pairs
from openpi_opt.config import Config
from openpi_opt.confirm import rounds
from openpi_opt.confirm.fresh import FreshRuns
from openpi_opt.confirm.rounds import Deadline
from openpi_opt.errors import UserError
from openpi_opt.process.child import Place
from openpi_opt.result import TrialResult
from openpi_opt.session import Measured, Session
from openpi_opt.track.journal import Journal
from openpi_opt.track.store import Store

CONTEXT = {"model": {"name": "pi0_mini"}, "platform": {"device": "cpu"}}
A = Config.parse(CONTEXT)
B = Config.parse({**CONTEXT, "attention": {"vision": "sdpa"}})


class Machine:
    """Means with a scatter of 0.3%, B faster by a given share; every process takes a second."""

    def __init__(self, faster: float = 0.0):
        self.random, self.faster = np.random.default_rng(5), faster
        self.ran: list[Config] = []
        self.now = 0.0

    def __call__(self, cfg: Config, *_: object) -> TrialResult:
        place = _[-1]
        assert isinstance(place, Place)
        assert place.turn is not None, "it has to ask"
        assert not cfg.profile.kernels
        self.ran.append(cfg)
        self.now += 1.0
        level = 10.0 * (1 - self.faster * (cfg.hash() == B.hash()))
        return ok(cfg, level * float(np.exp(self.random.normal(0, 0.003))))


def measure(
    folder: Path, machine: object, planned: int = 20, limit_s: float | None = None
) -> tuple[Session, Measured]:
    store = Store.open(folder)
    journal = Journal.open(store.study_dir("s"))
    said: list[str] = []
    runs = FreshRuns(store, journal, None, CPU, said.append, machine)  # type: ignore[arg-type]
    session = Session("pairs", A, runs, folder / "out", 0, planned, Deadline(limit_s))
    with session.alone(None):
        return session, pairs.measure(session, B)


def test_every_round_has_the_three_in_random_order_and_all_count(tmp_path: Path) -> None:
    machine = Machine(faster=0.02)
    session, found = measure(tmp_path, machine)
    assert found.rounds == 20
    assert len(machine.ran) == 62  # one unjudged of each
    processes = found.processes
    orders = [tuple(p.shown for p in processes[at : at + 3]) for at in range(0, 60, 3)]
    assert all(sorted(order) == sorted(pairs.ROLES) for order in orders)
    assert len(set(orders)) > 3
    assert {p.shown for p in processes if p.result.latency.mean_ms < 9.9} == {"B"}
    session.write(pairs.report(session, B, found))
    rows = [
        line for line in (tmp_path / "out" / "pairs.md").read_text().splitlines() if "|" in line
    ]
    assert [row.count("|") for row in rows] == [4] * 5 + [8] * 4, "as many cells as heads"
    document = json.loads((tmp_path / "out" / "pairs.json").read_text())
    assert document["a_a"]["verdict"] in ("same", "ambiguous")
    assert document["a_b"]["verdict"] == "faster"
    assert document["a_b"]["ci95"][0] < -0.02 < document["a_b"]["ci95"][1]
    assert document["a_b"]["sign_flip_p_value"] < 0.001
    assert document["spread"]["low"] < 0.003 < document["spread"]["high"]
    assert len(document["processes"]) == 60
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"pairs.{end}" for end in ("md", "json", "png", "svg")
    }


def test_flags_are_counted_below_the_tables(tmp_path: Path) -> None:
    machine = Machine()

    def shared(cfg: Config, *rest: object) -> TrialResult:
        found = machine(cfg, *rest)
        flags = ["gpu_shared", "drift"] if cfg.hash() == B.hash() else ["drift"]
        return ok(cfg, found.latency.mean_ms, flags)  # type: ignore[union-attr]

    session, found = measure(tmp_path, shared, planned=4)
    said = pairs.report(session, B, found).text.splitlines()
    assert "- flagged drift: 12 of 12 processes" in said
    assert "- flagged gpu_shared: 4 of 12 processes" in said


def test_the_time_ends_it_at_a_whole_round_and_the_rest_can_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    monkeypatch.setattr(rounds.time, "monotonic", lambda: machine.now)
    session, found = measure(tmp_path, machine, limit_s=20.0)
    assert 3 <= found.rounds <= 6  # each takes 3 s, and A and B went before
    assert len(machine.ran) == 2 + 3 * found.rounds
    text = pairs.report(session, B, found).text
    assert "(20 were planned; the time was over)" in text
    for _ in range(2):  # the second runs nothing
        session, whole = measure(tmp_path, machine)
        assert whole.rounds == 20
        assert len(machine.ran) == 62
    assert session.wall_s is None


def test_one_that_fails_ends_it(tmp_path: Path) -> None:
    def fails(cfg: Config, *_: object) -> TrialResult:
        return failed(cfg, "oom") if cfg.hash() == B.hash() else ok(cfg, 10.0)

    with pytest.raises(UserError, match=r"nothing to compare with: B ended oom"):
        measure(tmp_path, fails)
