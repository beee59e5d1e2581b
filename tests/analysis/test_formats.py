"""Files as AMD's and NVIDIA's own profilers write them, and what is named instead of read."""

import csv
import gzip
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from trace_samples import rocprof, scene, timed

from openpi_opt import analyze
from openpi_opt.analysis.breakdown import analyse, break_down
from openpi_opt.errors import UserError
from openpi_opt.measure.trace import Recording

Kernels = list[tuple[str, int, int]]  # name, start and end in nanoseconds


def rocprof_v1(path: Path, kernels: Kernels) -> None:
    events: list[dict[str, Any]] = [{}]
    for pid, name in ((2, "CPU HIP API"), (6, "GPU0")):
        about = {"ph": "M", "pid": pid, "name": "process_name", "sort_index": 0}
        events.append({"args": {"name": name}, **about})
    host = {"ph": "X", "name": "hipLaunchKernel", "pid": "2", "tid": "9", "ts": "5", "dur": "1"}
    events.append({**host, "args": {"BeginNs": "5000", "EndNs": "6000"}})
    for name, start, end in kernels:
        args = {"BeginNs": str(start), "EndNs": str(end), "DurationNs": str(end - start)}
        times = {"ts": str(start // 1000), "dur": str((end - start) // 1000)}
        events.append({"ph": "X", "name": name, "pid": "6", "tid": "0", **times, "args": args})
    path.write_text(json.dumps({"traceEvents": events, "otherData": {}}))


def rocprof_v3(path: Path, kernels: Kernels) -> None:
    names = list(dict.fromkeys(name for name, _, _ in kernels))
    symbols = [{"kernel_id": i, "formatted_kernel_name": name} for i, name in enumerate(names)]
    records = [
        {
            "start_timestamp": start,
            "end_timestamp": end,
            "dispatch_info": {"kernel_id": names.index(name), "agent_id": {"handle": 4}},
        }
        for name, start, end in kernels
    ]
    tool = {"kernel_symbols": symbols, "buffer_records": {"kernel_dispatch": records}}
    path.write_text(json.dumps({"rocprofiler-sdk-tool": [tool]}))


def comma_separated(path: Path, kernels: Kernels) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["Kind", "Agent_Id", "Kernel_Name", "Start_Timestamp", "End_Timestamp"])
        writer.writerows(["KERNEL_DISPATCH", 1, *kernel] for kernel in kernels)


def packed(path: Path, kernels: Kernels) -> None:
    comma_separated(path, kernels)
    path.write_bytes(gzip.compress(path.read_bytes()))


def rocpd(path: Path, kernels: Kernels) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE d (name, start, end, agent_id, stream_id)")
        database.execute("CREATE VIEW kernels AS SELECT * FROM d")
        database.executemany("INSERT INTO d VALUES (?, ?, ?, 0, 1)", kernels)
    database.close()


def nsight(path: Path, kernels: Kernels) -> None:
    names = list(dict.fromkeys(name for name, _, _ in kernels))
    columns = "start, end, deviceId, streamId, demangledName"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE StringIds (id, value)")
        database.executemany("INSERT INTO StringIds VALUES (?, ?)", enumerate(names))
        database.execute(f"CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL ({columns})")
        rows = [(start, end, 0, 7, names.index(name)) for name, start, end in kernels]
        database.executemany("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?,?,?,?,?)", rows)
    database.close()


@pytest.mark.parametrize("write", [rocprof_v1, rocprof_v3, comma_separated, packed, rocpd, nsight])
def test_every_format_says_the_same(write, tmp_path):
    made = scene()
    kernels = [(name, int(at * 1e3), int((at + us) * 1e3)) for at, (_, name, us) in timed(made)]
    write(tmp_path / "file", kernels)
    found = analyse(tmp_path / "file")
    assert found.launches == len(made.kernels)
    assert found.total_ms == pytest.approx(sum(us for _, _, us in made.kernels) / 1e3, rel=1e-6)
    assert (found.inferences, found.steps) == (1, 10)
    assert {name: part.launches for name, part in found.stages.items()} == dict(made.launches())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x0a\x10\x40\x01\x50\x03\xd2\x02\x09\x08\x06\x18\x00", "rocprofv3 --output-format"),
        (b"QDSTRM....", "nsys export --type sqlite"),
        (b"SQLite format 3\x00 but no more", "damaged database"),
    ],
)
def test_what_is_not_read_is_named_with_its_conversion(content, says, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        analyze.main([str(tmp_path / "file")])
    assert len(str(caught.value).splitlines()) <= 3


def test_a_database_without_kernels_and_damaged_times(tmp_path):
    sqlite3.connect(tmp_path / "empty.db").execute("CREATE TABLE x (y)").connection.close()
    with pytest.raises(UserError, match="without kernels"):
        analyze.main([str(tmp_path / "empty.db")])
    comma_separated(tmp_path / "a.csv", [("k", 5, 4)])
    with pytest.raises(UserError, match="damaged kernel 'k': from 5 to 4 ns"):
        analyze.main([str(tmp_path / "a.csv")])


@pytest.mark.parametrize("wild", [1e13, -1e13])
def test_a_kernel_with_a_wild_timestamp_is_set_aside(wild):
    events = [{**event, "ts": event["ts"] + 2e13} for event in rocprof(scene())]
    plain = break_down(Recording.of(events), "t")
    stray = {**events[50], "ts": events[50]["ts"] + wild}
    found = break_down(Recording.of([*events, stray]), "t")
    assert found.span_ms == plain.span_ms
    assert (found.launches, found.stages) == (plain.launches, plain.stages)
    assert any(note.startswith("1 kernel(s) with a timestamp") for note in found.notes)


def test_two_files_of_one_name_are_told_apart(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.json").write_text(json.dumps(rocprof(scene(steps=2))))
    paths = [str(tmp_path / folder / "t.json") for folder in ("a", "b")]
    assert analyze.main(["--json", *paths]) == 0
    assert [each["file"] for each in json.loads(capsys.readouterr().out)["traces"]] == paths
