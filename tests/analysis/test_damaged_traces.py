"""Whatever a file holds: figures, or one message that names the file. Never a traceback."""

import contextlib
import gzip
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trace_samples import Scene, scene, uncaptured

from openpi_opt.analysis import trace_file
from openpi_opt.analysis.breakdown import break_down
from openpi_opt.analysis.trace_file import read_trace
from openpi_opt.analyze import main
from openpi_opt.errors import UserError
from openpi_opt.measure import trace
from openpi_opt.measure.trace import ProfileError, Recording

KERNEL: dict[str, Any] = {
    "ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 1.5, "dur": 2.0,
    "args": {"correlation": 1, "stream": 7},
}  # fmt: skip
WHOLE = json.dumps({"traceEvents": [KERNEL] * 3, "traceName": "t"}).encode()
PACKED = gzip.compress(WHOLE)


def with_event(**change: Any) -> bytes:
    return json.dumps({"traceEvents": [KERNEL, {**KERNEL, **change}]}).encode()


def without(key: str) -> bytes:
    return json.dumps([{k: v for k, v in KERNEL.items() if k != key}]).encode()


DAMAGED = {
    "empty": (b"", "empty"),
    "blank": (b" \n ", "empty"),
    "cut": (WHOLE[:-20], "truncated"),
    "cut inside an event": (WHOLE[:100], "truncated"),
    "cut after a comma": (b'{"traceEvents": [{"ph": "M"},', "truncated"),
    "only the beginning": (b'{"traceEvents": [', "truncated"),
    "gzip, cut": (PACKED[:-20], "gzip"),
    "gzip, a byte changed": (PACKED[:40] + b"\x00\x01\x02" + PACKED[43:], "gzip"),
    "gzip, header only": (PACKED[:10], "gzip"),
    "gzip of nothing": (gzip.compress(b""), "empty"),
    "gzip of gzip": (gzip.compress(PACKED), "no JSON"),
    "text": (b"hello", "no JSON"),
    "binary": (bytes(range(256)) * 4, "no JSON"),
    "not quite JSON": (b"{'traceEvents': []}", "no JSON"),
    "no separator": (b'{"traceEvents": [{} {}]}', "no JSON"),
    "two documents": (WHOLE + WHOLE, "after the end"),
    "number": (b"5", "no JSON"),
    "object without events": (b'{"schemaVersion": 1}', "traceEvents"),
    "events are an object": (b'{"traceEvents": {"a": 1}}', "not a list"),
    "events are null": (b'{"traceEvents": null}', "not a list"),
    "no events": (b'{"traceEvents": []}', "none of its 0 events"),
    "no kernels": (b'[{"ph": "M", "name": "process_name"}]', "none of its 1 events"),
    "an event is a number": (b'{"traceEvents": [17]}', "Damaged event"),
    "an event is a list": (b"[[]]", "Damaged event"),
    "negative duration": (with_event(dur=-1.0), "Damaged event"),
    "negative start": (with_event(ts=-0.5), "Damaged event"),
    "duration is NaN": (with_event(dur=float("nan")), "Damaged event"),
    "duration is infinite": (with_event(dur=float("inf")), "Damaged event"),
    "start beyond 64 bits": (with_event(ts=10**400), "Damaged event"),
    "duration is text": (with_event(dur="2.0"), "Damaged event"),
    "duration is true": (with_event(dur=True), "Damaged event"),
    "name is a number": (with_event(name=3), "Damaged event"),
    "arguments are a list": (with_event(args=[1]), "Damaged event"),
    "no duration": (without("dur"), "Damaged event"),
    "no start": (without("ts"), "Damaged event"),
    "no name": (without("name"), "Damaged event"),
    "nested without end": (b"[" * 200_000, "nested"),
    "an event nested without end": (b'{"traceEvents": [' + b'{"a":' * 200_000, "nested"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "said"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_said_with_the_name_of_the_file(content, said, tmp_path):
    path = tmp_path / "damaged.json.gz"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        main([str(path)])
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_valid_events_may_be_a_bomb(tmp_path, monkeypatch):
    """A megabyte of gzip that holds hundreds of valid kernels: refused after the first 16."""
    one = json.dumps(KERNEL).encode() + b","
    path = tmp_path / "bomb.json.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"[" + one * (40 * 2**20 // len(one)))
    with pytest.raises(UserError, match=r"64 times its size .*KiB to 1\d MiB"):
        main([str(path)])
    # one that packs like a trace ends by its number of launches
    monkeypatch.setattr(trace, "MAX_LAUNCHES", 1000)
    path.write_bytes(gzip.compress(json.dumps([KERNEL] * 1001).encode()))
    main([str(path)])
    path.write_bytes(gzip.compress(json.dumps([KERNEL] * 1003).encode()))
    with pytest.raises(UserError, match="more than 1,000 kernels"):
        main([str(path)])


def test_rocprofv3s_one_value_is_bounded(tmp_path, monkeypatch):
    """It is decoded whole, to eight times its size; its rows in CSV are not."""
    monkeypatch.setattr(trace_file, "SDK_MIB", 1)
    record = {"start_timestamp": 1, "end_timestamp": 2, "thread_id": 7}
    tool = {"kernel_symbols": [], "buffer_records": {"kernel_dispatch": [record] * 60_000}}
    path = tmp_path / "v3_results.json"
    path.write_text(json.dumps({"rocprofiler-sdk-tool": [tool]}))
    with pytest.raises(UserError, match=r"more than 1 MiB .* --output-format csv"):
        main([str(path)])


def test_a_missing_file_and_a_folder(tmp_path):
    for path, said in ((tmp_path / "none.json", "No such file"), (tmp_path, "directory")):
        with pytest.raises(UserError, match=said):
            main([str(path)])


def test_one_damaged_trace_of_two_is_not_passed_over(tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_bytes(WHOLE)
    bad.write_bytes(WHOLE[:-9])
    with pytest.raises(UserError, match=r"bad\.json"):
        main([str(good), str(bad)])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + WHOLE,  # a byte order mark
        b" \n" + WHOLE + b"\n\n",
        json.dumps({"deviceProperties": [{"id": 0}], "traceEvents": [KERNEL], "x": 5}).encode(),
        b'{"displayTimeUnit": "ms", "traceEvents": [' + WHOLE[17 : WHOLE.index(b"}}") + 2] + b"]}",
        # What NVIDIA's occupancy estimate looks like where there is none.
        with_event(args={"est. achieved occupancy %": float("nan")}),
        WHOLE.replace(b"gemm", b"gemm\xff"),  # a name that is no UTF-8
        with_event(args={"correlation": 2**80, "stream": "seven", "External id": True}),
    ],
    ids=["mark", "spaces", "more keys", "unit", "nan beside", "no utf-8", "odd ids"],
)  # fmt: skip
def test_what_is_odd_and_harmless_is_read(content, tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    assert len(read_trace(path).kernels()) >= 1


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_borders_of_the_buffer_do_not_matter(chunk, tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    umlaut = {**KERNEL, "name": "gemm für €", "ts": 12.25}
    path.write_text(json.dumps({"a": 123, "traceEvents": [umlaut, KERNEL], "b": -1}, indent=1))
    monkeypatch.setattr(trace_file, "CHUNK", chunk)
    timeline = read_trace(path).kernels()
    assert [timeline.names[i] for i in timeline.name] == ["gemm", "gemm für €"]
    assert timeline.start_us.tolist() == [1.5, 12.25]


def test_too_large_is_said(tmp_path, monkeypatch):
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(b"[" + b" " * 3 * 2**20 + b"]"))
    monkeypatch.setattr(trace_file, "MAX_FILE_MIB", 2)
    with pytest.raises(ProfileError, match="more than 2 MiB"):
        read_trace(path)
    monkeypatch.setattr(trace_file, "MAX_FILE_MIB", 100)
    monkeypatch.setattr(trace_file, "MAX_VALUE_MIB", 1)
    path.write_bytes(gzip.compress(b'["' + b"x" * 4 * 2**20 + b'"]'))
    with pytest.raises(ProfileError, match="one value of more than 1 MiB"):
        read_trace(path)


SAMPLE = json.dumps({"traceEvents": uncaptured(Scene(scene().kernels[:6]))}).encode()


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_of_bytes_is_a_message(data, tmp_path):
    content = bytearray(SAMPLE if data.draw(st.booleans()) else gzip.compress(SAMPLE, mtime=0))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["change", "cut", "repeat"]))
        if kind == "change":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 50))]
        else:
            content[at:at] = content[max(at - 30, 0) : at]
        if not content:
            break
    path = tmp_path / "t.json"
    path.write_bytes(bytes(content))
    with contextlib.suppress(ProfileError):
        assert break_down(read_trace(path), "t").launches > 0


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(
        ["", "X", "kernel", "cpu_op", "openpi_opt::prefill", "attn_fwd", "gpu_memset", "aten::mm"]
    )
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
TIMES = st.floats(0, 1e6) | st.integers(0, 2**50)
EVENTS = ANYTHING | st.fixed_dictionaries(
    {},
    optional={
        "ph": st.just("X") | SCALARS,
        "cat": st.sampled_from(
            ["kernel", "gpu", "gpu_memcpy", "cpu_op", "cuda_runtime", "user_annotation"]
        )
        | ANYTHING,
        "name": st.sampled_from(
            ["gemm", "attn_fwd", "openpi_opt::vision", "openpi_opt::prefill", "aten::mm",
             "hipGraphLaunch"]
        ) | ANYTHING,
        "ts": TIMES | SCALARS,
        "dur": TIMES | SCALARS,
        "pid": ANYTHING,
        "tid": ANYTHING,
        "args": st.dictionaries(
            st.sampled_from(["correlation", "External id", "stream", "device"]), ANYTHING
        )
        | ANYTHING,
    },
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=6))
def test_any_events_are_a_message_or_sound_figures(events):
    try:
        found = break_down(Recording.of(events), "t")
    except ProfileError:
        return
    text = json.dumps(found.__dict__, default=vars, allow_nan=False)
    assert json.loads(text)["launches"] == found.launches > 0
    assert found.idle_ms >= 0
    assert found.busy_ms <= found.total_ms * (1 + 1e-9) + 1e-3
    if found.stages:
        assert sum(part.launches for part in found.stages.values()) == found.launches


VALID = st.builds(
    lambda name, category, ts, dur, correlation: {
        **KERNEL, "cat": category, "name": name, "ts": ts, "dur": dur,
        "args": {"correlation": correlation},
    },
    st.sampled_from(["gemm", "attn_fwd", "openpi_opt::vision", "openpi_opt::prefill", "aten::mm"]),
    st.sampled_from(["kernel", "gpu", "cpu_op", "cuda_runtime", "user_annotation"]),
    st.floats(0, 100).map(lambda x: round(x, 3)),
    st.floats(0, 100).map(lambda x: round(x, 3)),
    st.integers(0, 3),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(VALID, min_size=1, max_size=12))
def test_overlapping_calls_and_markers_are_read(events):
    recording = Recording.of(events)
    expected = sorted(
        (e["ts"], e["dur"]) for e in events if e["cat"] in ("kernel", "gpu")
    )  # fmt: skip
    timeline = recording.kernels()
    assert sorted(zip(timeline.start_us, timeline.duration_us, strict=True)) == expected
    markers = [
        e for e in events if e["cat"] == "user_annotation" and e["name"].startswith("openpi_opt::")
    ]
    calls = {e["args"]["correlation"]: e for e in events if e["cat"] == "cuda_runtime"}
    for stage, correlation in zip(timeline.staged, timeline.correlation.tolist(), strict=True):
        call = calls.get(correlation)
        if not markers or call is None:
            assert stage is None
            continue
        around = [m for m in markers if m["ts"] <= call["ts"] < m["ts"] + m["dur"] - 1e-9]
        if not around:
            assert stage == "other"
            continue
        latest = max(m["ts"] for m in around)
        ends = [m for m in around if m["ts"] == latest]
        inner = min(m["ts"] + m["dur"] for m in ends)
        names = {
            m["name"].removeprefix("openpi_opt::")
            for m in ends
            if m["ts"] + m["dur"] <= inner + 1e-3
        }
        assert stage in names
