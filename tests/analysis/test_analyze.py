"""The verb on generated traces of each kind: sums against an independent count, and the output."""

import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from typing import Any

import pytest
from trace_samples import Event, Scene, replay, rocprof, runtime, scene, uncaptured, write

from openpi_opt.analysis.breakdown import analyse, break_down
from openpi_opt.analyze import main
from openpi_opt.measure.categories import categorise
from openpi_opt.measure.trace import Recording

KINDS = {
    "uncaptured": uncaptured,
    "replay": replay,
    "rocprof": rocprof,
    "rocprofv3": lambda made: rocprof(made, "kernel"),
}


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_sums_are_exact(kind, name, bare, tmp_path):
    made = scene(cameras=2, kind="eager")
    found = analyse(write(tmp_path / name, KINDS[kind](made), bare))
    assert found.kind == "device_kernels"
    assert found.launches == len(made.kernels)
    assert found.total_ms == pytest.approx(sum(us for _, _, us in made.kernels) / 1e3)
    assert found.stages_from == ("markers" if kind == "uncaptured" else "pattern")
    assert (found.inferences, found.steps) == (1, 10)
    assert {stage: part.launches for stage, part in found.stages.items()} == made.launches()
    assert {stage: part.ms for stage, part in found.stages.items()} == pytest.approx(made.ms())
    counts = Counter(categorise(kernel) for _, kernel, _ in made.kernels)
    assert {c: part.launches for c, part in found.categories.items() if part.launches} == counts
    assert sum(part.ms for part in found.categories.values()) == pytest.approx(found.total_ms)
    for stage, parts in found.stage_categories.items():
        assert sum(p.ms for p in parts.values()) == pytest.approx(found.stages[stage].ms)
    assert sum(row.launches for row in found.kernels) == found.launches
    assert [row.ms for row in found.kernels] == sorted((r.ms for r in found.kernels), reverse=True)


def kernels(*times: tuple[float, float], lane: int = 0) -> list[Event]:
    return [
        {"ph": "X", "cat": "kernel", "name": f"k{i}", "pid": lane, "ts": at, "dur": us}
        for i, (at, us) in enumerate(times)
    ]


def test_gaps_are_where_nothing_runs():
    # k1 runs inside k0; 3 us of rest, then 1500.
    found = break_down(Recording.of(kernels((10, 10), (12, 4), (23, 2), (1525, 5))), "t")
    assert found.total_ms == pytest.approx(0.021)
    assert found.busy_ms == pytest.approx(0.017)
    assert found.span_ms == pytest.approx(1.520)
    assert found.idle_ms == pytest.approx(1.503)
    assert {g.above_us: (g.gaps, g.ms) for g in found.gaps if g.gaps} == {
        2.0: (1, pytest.approx(0.003)),
        1000.0: (1, pytest.approx(1.5)),
    }
    longest = found.longest_gaps[0]
    assert (longest.us, longest.after, longest.before) == (pytest.approx(1500), "k2", "k3")
    assert longest.at_ms == pytest.approx(0.015)
    assert any("overlap for 0.004 ms" in note for note in found.notes)


def test_several_devices_are_said():
    found = break_down(Recording.of([*kernels((0, 5)), *kernels((5, 5), lane=1)]), "t")
    assert any("2 devices" in note for note in found.notes)
    assert found.idle_ms == 0


def test_a_recorder_that_closes_the_gaps_is_noticed():
    start = 3097885635109.44  # microseconds since the epoch lose the last decimal
    events = kernels(*((start + i * 4.799, 4.799) for i in range(100)))
    found = break_down(Recording.of(events), "t")
    assert any("99 of 99 kernels begin exactly" in note for note in found.notes)
    assert found.idle_ms == pytest.approx(0, abs=1e-3)
    assert not [gap for gap in found.gaps if gap.gaps]


def test_a_launch_without_its_kernel_is_noticed():
    events = [*replay(scene()), runtime("hipGraphLaunch", 2.0, 6)]
    assert any(
        "Counts are too low: 1" in note for note in break_down(Recording.of(events), "").notes
    )


def test_markers_of_another_call_do_not_name_a_replay():
    """A graph is launched outside of all markers: an uncaptured call before it is no guide."""
    made = scene()
    marker = {"ph": "X", "cat": "user_annotation", "name": "openpi_opt::vision", "pid": 1, "tid": 1}
    events = [{**marker, "ts": 0.0, "dur": 1.0}, *replay(made)]
    found = break_down(Recording.of(events), "t")
    assert found.stages_from == "pattern"
    assert any("launched outside" in note for note in found.notes)
    assert {stage: part.launches for stage, part in found.stages.items()} == made.launches()


def test_operators_stand_in_where_there_is_no_gpu():
    operator = {"ph": "X", "cat": "cpu_op", "pid": 1, "tid": 1}
    events = [
        {**operator, "name": "aten::linear", "ts": 0.0, "dur": 30.0},
        {**operator, "name": "aten::addmm", "ts": 1.0, "dur": 20.0},
        {**operator, "name": "aten::gelu", "ts": 40.0, "dur": 5.0},
    ]
    found = break_down(Recording.of(events), "t")
    assert (found.kind, found.launches) == ("operator_calls", 2)
    assert found.categories["gemm"].ms == pytest.approx(0.030)
    assert any("operator calls on the host" in note for note in found.notes)


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_traces_stand_side_by_side(tmp_path, capsys):
    one = write(tmp_path / "one.json", uncaptured(scene()))
    two = write(tmp_path / "two.json.gz", rocprof(scene(cameras=3).repeated(2)))
    text = output(capsys, str(one), str(two))
    assert "A: one.json" in text
    assert "B: two.json.gz" in text
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    # Of two inferences each is shown: what is compared is one against one.
    assert lines["vision"][2] == "220"
    assert lines["vision"][5] == "660"
    assert lines["denoise"][0] == lines["denoise"][3]
    assert lines["inferences"] == ["1", "2"]
    assert "markers" not in text.split("categories")[0].split("stages")[1].splitlines()[0]


def test_json_holds_everything(tmp_path, capsys):
    made = scene().repeated(2)
    path = write(tmp_path / "t.json", rocprof(made))
    (document,) = json.loads(output(capsys, "--json", str(path)))["traces"]
    assert document["inferences"] == 2
    assert document["launches"] == len(made.kernels)  # of the whole trace
    assert set(document["stages"]) == {"vision", "prefill", "denoise"}
    assert len(document["kernels"]) == len({name for _, name, _ in made.kernels})


@pytest.mark.parametrize("name", ["f()#1}[red]gemm[/red]", "foo(int) [clone .kd]", "a[/]b"])
def test_names_are_no_markup(name, tmp_path, capsys):
    events: list[dict[str, Any]] = [dict(event, name=name) for event in kernels((0, 1), (5, 1))]
    text = output(capsys, str(write(tmp_path / "[bold]t.json", events)))
    row = text.split("top kernels")[1].splitlines()[3]
    assert row.split(maxsplit=4)[4].strip() == name
    assert f"after {name}, before {name}" in text


def test_names_cannot_move_the_cursor(tmp_path, capsys):
    events: list[dict[str, Any]] = [dict(e, name="a\x1b[2J\n\ud800z") for e in kernels((0, 1))]
    text = output(capsys, str(write(tmp_path / "t.json", events)))
    assert "a\\x1b[2J\\n\\ud800z" in text
    assert all(line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_digit_is_lost_where_it_is_narrow(width, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("openpi_opt.analyze.PIPE_WIDTH", width)
    made = [scene(cameras=cameras, kind="eager") for cameras in (1, 2, 3)]
    paths = [write(tmp_path / f"{n}.json", rocprof(each)) for n, each in enumerate(made)]
    text = output(capsys, "--top", "3", *map(str, paths))
    words = Counter(text.split())
    for path in paths:
        found = analyse(path)
        for part in [*found.stages.values(), *found.categories.values(), *found.kernels[:3]]:
            if part.launches:
                assert words[f"{part.ms:.3f}"]
                assert words[str(part.launches)]
                assert words[f"{part.ms / found.total_ms:.1%}"]
    tables = [
        line for line in text.splitlines() if not line.startswith("   ") and "idle" not in line
    ]
    assert max(len(line.rstrip()) for line in tables) <= max(width, 64)


def test_the_command(tmp_path):
    path = write(tmp_path / "t.json", rocprof(scene()))
    command = [sys.executable, "-m", "openpi_opt.analyze", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "from pattern" in done.stdout
    path.write_bytes(path.read_bytes()[:-5000])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert str(path) in done.stderr
    assert "truncated" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("packed", [False, True])
def test_memory_stays_far_below_the_file(packed, tmp_path):
    """Some 30 MB of text: what is held is a few dozen bytes of each event that counts."""
    made = scene().repeated(8)
    events = uncaptured(made)
    padding = {"grid": [768, 1, 1], "block": [256, 1, 1], "est. achieved occupancy %": 38}
    for event in events:
        event.setdefault("args", {}).update(padding, note="x" * 400)
    path = write(tmp_path / ("t.json.gz" if packed else "t.json"), events)
    size = len(json.dumps(events))
    assert size > 25e6
    count = len(events)
    del events
    tracemalloc.start()
    try:
        found = analyse(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.launches == len(made.kernels)
    assert found.inferences == 8
    # The sliding buffer (a few MiB of text while it moves) and about 150 bytes an event.
    assert peak < 8 * 2**20 + 150 * count, f"{peak / 2**20:.1f} MiB for {size / 2**20:.1f}"
    assert peak < size / 2


def test_the_verb_never_imports_torch(tmp_path):
    path = write(tmp_path / "t.json", rocprof(Scene([("x", "gemm", 1.0)])))
    code = (
        "import sys; from openpi_opt.analyze import main; main([sys.argv[1]]); "
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-c", code, str(path)]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=120)
