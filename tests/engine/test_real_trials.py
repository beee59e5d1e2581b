"""The sweep as users run it: real processes, the real policy (pi0_mini) on the CPU."""

import json
import os
import signal

import pytest
from terminal_samples import Terminal, trials_of

from openpi_opt.result import Failed, Ok

FULL_OUTPUT = 200  # columns: nothing is cut at 80


@pytest.fixture
def terminal(tmp_path):
    yield Terminal(tmp_path)
    assert list(trials_of(tmp_path)) == []


def test_a_sweep_and_the_same_again(terminal):
    code, out, err = terminal.run("-m", "attention=aiter,sdpa")
    assert code == 0, err
    outcomes = [(r.role, r.labels["attention"], r.result.outcome) for r in terminal.records]
    assert outcomes == [
        ("baseline", "eager", "ok"),
        ("trial", "aiter", "unavailable"),
        ("trial", "sdpa", "ok"),
    ]
    assert "needs an AMD GPU with ROCm" in out
    # Which of the two is faster is the machine's business, and a busy one may not tell.
    if "nothing that was tried is faster" not in out:
        assert "best: trial 2 (attention=sdpa)" in out
        assert "python -m openpi_opt.promote s --name NAME" in out
    assert "python -m openpi_opt.compare s" in out
    assert "model pi0_mini on cpu" in err
    assert [path.name for path in terminal.folder.iterdir()] == ["mlruns"]

    again, out, err = terminal.run("-m", "attention=aiter,sdpa")
    assert again == 0
    assert len(terminal.records) == 3
    assert "0 new" in out
    assert err.count("known, not run again") == 2


def test_two_objectives_then_a_limit_then_another_objective(terminal):
    """Measured once, with a Pareto set in table and plots; judged anew by a limit."""
    words = ("-m", "attention=sdpa", "model=pi0_mini", "tracking=none")
    code, out, err = terminal.run(*words, "objective=[memory,latency]", "pruning=2")
    assert code == 0, err
    assert "pruning=2 is off" in err
    assert "Pareto set of latency and memory: " in out
    assert "best:" not in out
    study_dir = terminal.folder / "mlruns" / "studies" / "s"
    (context,) = json.loads((study_dir / "pareto.json").read_text())["contexts"]
    measured = {r.number: r.result for r in terminal.records if isinstance(r.result, Ok)}
    figures = {n: (ok.latency.mean_ms, ok.memory.peak_mib) for n, ok in measured.items()}
    assert len(figures) == 2
    better = [
        number
        for number in figures
        if not any(
            all(a <= b for a, b in zip(other, figures[number], strict=True))
            and other != figures[number]
            for other in figures.values()
        )
    ]
    assert sorted(entry["number"] for entry in context["pareto"]) == better
    assert {path.name for path in study_dir.glob("pareto.*")} == {
        "pareto.json",
        "pareto.png",
        "pareto.svg",
    }
    lower, upper = sorted(memory for _, memory in figures.values())
    limit = f"limits.peak_mib={(lower + upper) / 2}"
    code, out, err = terminal.run(*words, "objective=[latency,memory]", limit)
    assert code == 0, err
    assert "0 new" in out
    assert "over limit" in out
    assert "Pareto set of latency and memory: 1 of 2 ok trials" in out
    code, out, err = terminal.run(*words)
    assert (code, out) == (2, "")
    assert "was begun with objective=[latency,memory]" in err
    assert len(terminal.records) == 2


def test_killed_hanging_and_greedy_trials_end_as_such_and_the_sweep_goes_on(terminal):
    sweep = terminal.start(
        "-m", "weights.seed=0,1,2", "baseline=false", "tracking=none", "limits.load=12"
    )
    killed = terminal.trial_pid(set())
    os.kill(killed, signal.SIGKILL)
    hanging = terminal.trial_pid({killed})
    os.kill(hanging, signal.SIGSTOP)
    out, err = sweep.communicate(timeout=100)
    assert sweep.returncode == 0, err
    crashed, timeout, fine = (record.result for record in terminal.records)
    assert isinstance(crashed, Failed)
    assert isinstance(timeout, Failed)
    assert (crashed.outcome, timeout.outcome, fine.outcome) == ("crashed", "timeout", "ok")
    assert "SIGKILL" in crashed.reason
    assert "limits.load" in timeout.reason
    assert "crashed" in out
    assert max(map(len, out.splitlines())) < FULL_OUTPUT


def test_a_trial_that_allocates_too_much_is_oom_and_nothing_ok_is_1(terminal):
    code, out, _ = terminal.run("workload.batch_size=10000000", "tracking=none")
    assert code == 1
    assert terminal.records[0].result.outcome == "oom"
    assert "no configuration was ok" in out
    assert "allocate" in out
    assert "log.txt" in out


def test_an_experiment_ends_with_its_table_and_plot(terminal):
    code, out, err = terminal.run(
        "experiment=batch_scaling", "out=report", "workload.batch_size=1,2", "tracking=none"
    )
    assert code == 0, err
    assert [r.result.config["workload"]["batch_size"] for r in terminal.records] == [1, 2]
    assert "# Batch scaling: pi0_mini on cpu" in out
    names = {path.name for path in (terminal.folder / "report").iterdir()}
    assert names == {f"batch_scaling.{kind}" for kind in ("md", "json", "png", "svg")}
