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


def judged(folder: Path, end: Ended) -> results.TrialResult:
    return judge(CFG, end, folder / "result.json", folder / "log.txt", "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize(
    ("end", "outcome", "words"),
    [
        (Ended(-9, "apply", exceeded=7.0), "timeout", ["apply", "7 s", "limits.compile"]),
        (Ended(-9, "start", exceeded=7.0), "timeout", ["start", "limits.load"]),
        (Ended(None, "measure", exceeded=7.0), "timeout", ["measure"]),
        (Ended(-9, "measure", oom_killed=True), "oom", ["out-of-memory killer", "measure"]),
        (Ended(-9), "crashed", ["SIGKILL"]),
        (Ended(-11, "measure", oom_killed=True), "crashed", ["SIGSEGV", "measure"]),
        (Ended(-40), "crashed", ["signal 40"]),
        (Ended(3), "crashed", ["code 3"]),
        (Ended(0), "error", ["without a result"]),
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


@pytest.mark.parametrize("code", [0, -signal.SIGSEGV])
def test_a_whole_result_is_taken_and_outlives_a_bad_end(tmp_path, code):
    results.write(tmp_path / "result.json", ok(CFG, 5.0))
    result = judged(tmp_path, Ended(code))
    assert isinstance(result, Ok)
    assert result.latency == ok(CFG, 5.0).latency
    assert ["SIGSEGV" in note for note in result.notes] == [True] * (code != 0)


WHOLE = ok(CFG, 5.0).model_dump_json()
OTHER = ok(Config.parse({"workload": {"seed": 9}}), 5.0).model_dump_json()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *((text, "cannot be read") for text in ("", "garbage", '{"outcome": "ok"}', "[]", "null")),
        (WHOLE[: len(WHOLE) // 2], "cannot be read"),
        *((WHOLE.replace('"mean_ms":5.0', f'"mean_ms":{ms}'), "mean_ms") for ms in ("-5.0", "0")),
        (WHOLE.replace('"mean_ms":5.0', '"mean_ms":NaN'), "cannot be read"),
        (OTHER, "another configuration"),
    ],
)
def test_what_is_no_result_of_it_is_an_error_that_says_so(tmp_path, content, words):
    (tmp_path / "result.json").write_text(content)
    result = judged(tmp_path, Ended(0))
    assert result.outcome == "error"
    assert words in result.reason


def test_every_phase_has_a_limit():
    limits = phase_limits(CFG.limits)
    assert set(limits) == set(Phase.__args__)
    assert limits["apply"] == CFG.limits.compile
    assert limits["start"] == CFG.limits.load


def test_the_tail_of_a_huge_log_is_read_from_its_end_and_bounded(tmp_path):
    log = tmp_path / "log.txt"
    assert log_tail(log) == ""
    with log.open("wb") as file:
        file.truncate(8 * 2**30)  # sparse: reading all of it would be noticed
        file.seek(0, 2)
        file.write(b"\xff\n" + b"\n".join(b"line %d" % i for i in range(100)))
    tail = log_tail(log)
    assert tail.splitlines()[-1] == "line 99"
    assert len(tail.splitlines()) == 40
    log.write_bytes("é".encode() * 100_000)  # one endless line
    assert 0 < len(log_tail(log)) <= 8192
