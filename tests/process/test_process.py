import signal
from pathlib import Path

import pytest
from search_samples import ok

from openpi_opt import result as results
from openpi_opt.config import Config
from openpi_opt.process.child import Ended
from openpi_opt.process.run import judge, log_tail, phase_limits
from openpi_opt.result import Failed, Ok, Phase

CFG = Config.parse({})


def ended(
    returncode: int | None = 0,
    phase: str = "measure",
    exceeded: float | None = None,
    oom: bool = False,
) -> Ended:
    return Ended(returncode, phase, {"start": 1.0}, exceeded, oom)


def judged(folder: Path, end: Ended) -> results.TrialResult:
    return judge(CFG, end, folder / "result.json", folder / "log.txt", "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize(
    ("end", "outcome", "words"),
    [
        (ended(-9, exceeded=7.0, phase="apply"), "timeout", ["apply", "7 s", "limits.compile"]),
        (ended(-9, exceeded=7.0, phase="start"), "timeout", ["start", "limits.load"]),
        (ended(None, exceeded=7.0), "timeout", ["measure"]),
        (ended(-signal.SIGKILL, oom=True), "oom", ["out-of-memory killer", "measure"]),
        (ended(-signal.SIGKILL), "crashed", ["SIGKILL"]),
        (ended(-signal.SIGSEGV, oom=True), "crashed", ["SIGSEGV", "measure"]),
        (ended(-40), "crashed", ["signal 40"]),
        (ended(3), "crashed", ["code 3"]),
        (ended(0), "error", ["without a result"]),
    ],
)
def test_an_end_without_a_result(tmp_path, end, outcome, words):
    (tmp_path / "log.txt").write_text("last words\n")
    result = judged(tmp_path, end)
    assert isinstance(result, Failed)
    assert result.outcome == outcome
    assert all(word in result.reason for word in words), result.reason
    assert (result.log_tail, result.phase) == ("last words", end.phase)
    assert result.config_hash == CFG.hash()
    assert results.parse(result.model_dump_json()) == result


def test_a_whole_result_is_taken(tmp_path):
    results.write(tmp_path / "result.json", ok(CFG, 5.0))
    assert judged(tmp_path, ended()) == ok(CFG, 5.0)


def test_a_whole_result_outlives_a_bad_end(tmp_path):
    results.write(tmp_path / "result.json", ok(CFG, 5.0))
    result = judged(tmp_path, ended(-signal.SIGSEGV))
    assert isinstance(result, Ok)
    assert "SIGSEGV" in result.notes[-1]


@pytest.mark.parametrize("content", ["", "garbage", '{"outcome": "ok"}', "[]", "null"])
def test_garbage_is_an_error_that_says_so(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    result = judged(tmp_path, ended())
    assert result.outcome == "error"
    assert "cannot be read" in result.reason


def test_half_a_result_is_an_error(tmp_path):
    whole = ok(CFG, 5.0).model_dump_json()
    (tmp_path / "result.json").write_text(whole[: len(whole) // 2])
    assert judged(tmp_path, ended()).outcome == "error"


@pytest.mark.parametrize("value", ["NaN", "-5.0", "0"])
def test_an_impossible_latency_is_no_result(tmp_path, value):
    text = ok(CFG, 5.0).model_dump_json().replace('"mean_ms":5.0', f'"mean_ms":{value}')
    (tmp_path / "result.json").write_text(text)
    assert judged(tmp_path, ended()).outcome == "error"


def test_a_result_of_another_configuration_is_refused(tmp_path):
    other = Config.parse({"workload": {"seed": 9}})
    results.write(tmp_path / "result.json", ok(other, 5.0))
    result = judged(tmp_path, ended())
    assert result.outcome == "error"
    assert "another configuration" in result.reason


def test_every_phase_has_a_limit():
    limits = phase_limits(CFG.limits)
    assert set(limits) == set(Phase.__args__)
    assert limits["apply"] == CFG.limits.compile
    assert limits["start"] == CFG.limits.load


def test_the_tail_of_a_huge_log_is_read_from_its_end(tmp_path):
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        file.truncate(8 * 2**30)  # sparse: reading all of it would be noticed
        file.seek(0, 2)
        file.write(b"\xff\n" + b"\n".join(b"line %d" % i for i in range(100)))
    tail = log_tail(log)
    assert tail.splitlines()[-1] == "line 99"
    assert len(tail.splitlines()) == 40


def test_a_log_of_one_endless_line_is_bounded(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes("é".encode() * 100_000)
    assert 0 < len(log_tail(log)) <= 8192
    assert log_tail(tmp_path / "none") == ""
