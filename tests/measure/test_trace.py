"""The reading of traces, on synthetic event lists of the shape that kineto writes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_opt.measure.profile import (
    kernels_of,
    profile_of,
    profile_of_replay_on_rocm,
    table_of,
    with_stages_of,
)
from openpi_opt.measure.trace import (
    ProfileError,
    Recording,
    Timeline,
    stage_by_sequence,
)

Event = dict[str, Any]
HOST = {"ph": "X", "pid": 100, "tid": 100}
COPIES = frozenset({"Memcpy DtoD (Device -> Device)", "Memset (Device)"})
NVJET = "nvjet_tst_128x64_64x8_2x1_v_bz_coopA_bias_TNT"
FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4>>"
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"
MEMCPY = "Memcpy DtoD (Device -> Device)"


def marker(stage: str, ts: float, dur: float) -> Event:
    return {**HOST, "cat": "user_annotation", "name": f"openpi_opt::{stage}", "ts": ts, "dur": dur}


def operator(name: str, ts: float, dur: float, **args: int) -> Event:
    return {**HOST, "cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "args": args}


def runtime(name: str, ts: float, correlation: int, cat: str = "cuda_runtime") -> Event:
    args = {"cbid": 211, "correlation": correlation}
    return {**HOST, "cat": cat, "name": name, "ts": ts, "dur": 2.0, "args": args}


def kernel(name: str, ts: float, dur: float, correlation: int, **more: Any) -> Event:
    args = {"stream": 7, "device": 0, "correlation": correlation, **more.pop("args", {})}
    device = {"ph": "X", "cat": "kernel", "pid": 0, "tid": 7}
    return {**device, "name": name, "ts": ts, "dur": dur, "args": args, **more}


def kernels_in(events: list[Event]) -> Timeline:
    return Recording.of(events).kernels()


def operators_in(events: list[Event]) -> Timeline:
    return Recording.of(events).operators()


def copy(ts: float, dur: float, correlation: int) -> Event:
    return kernel(MEMCPY, ts, dur, correlation, cat="gpu_memcpy")


EAGER = [
    {"ph": "M", "name": "process_name", "pid": 100, "tid": 0, "ts": 0, "args": {"name": "python"}},
    {**HOST, "cat": "user_annotation", "name": "ProfilerStep#1", "ts": 0.0, "dur": 1000.0},
    marker("vision", 10.0, 100.0),
    operator("aten::addmm", 20.0, 30.0),
    runtime("cudaLaunchKernel", 30.0, 1),
    marker("prefill", 120.0, 80.0),
    runtime("cuLaunchKernelEx", 130.0, 2, cat="cuda_driver"),
    runtime("cudaMemcpyAsync", 150.0, 3),
    marker("denoise", 210.0, 20.0),
    runtime("cudaLaunchKernel", 215.0, 4),
    marker("denoise", 240.0, 20.0),
    runtime("cudaLaunchKernel", 245.0, 5),
    runtime("cudaLaunchKernel", 300.0, 6),
    runtime("cudaDeviceSynchronize", 310.0, 7),
    # The device runs behind the host: by its own clock the first kernel is in "prefill".
    {"ph": "X", "cat": "gpu_user_annotation", "name": "openpi_opt::vision", "pid": 0, "tid": 7,
     "ts": 150.0, "dur": 40.0},
    kernel(NVJET, 150.0, 40.0, 1),
    copy(230.0, 5.0, 3),
    kernel(FLASH, 200.0, 20.0, 2),
    kernel(ADD, 250.0, 3.0, 4),
    kernel(ADD, 260.0, 4.0, 5),
    kernel(NVJET, 310.0, 10.0, 6),
    {"ph": "s", "id": 1, "pid": 100, "tid": 100, "ts": 30.0, "cat": "ac2g", "name": "ac2g"},
]  # fmt: skip
REPLAY = [
    runtime("cudaMemcpyAsync", 10.0, 1),
    runtime("cudaGraphLaunch", 20.0, 2),
    runtime("cudaMemcpyAsync", 30.0, 3),
    copy(25.0, 1.0, 1),
    kernel(NVJET, 30.0, 38.0, 2),
    kernel(FLASH, 70.0, 19.0, 2),
    copy(90.0, 5.0, 2),
    kernel(ADD, 96.0, 2.0, 2),
    kernel(ADD, 99.0, 2.0, 2),
    kernel(NVJET, 102.0, 9.0, 2),
    copy(112.0, 1.0, 3),
]


def test_kernels_are_listed_in_order_of_their_start_with_the_stage_of_their_launch():
    found = kernels_in(EAGER)
    assert list(zip(found.launched, found.start_us, found.staged, strict=True)) == [
        (NVJET, 150.0, "vision"),
        (FLASH, 200.0, "prefill"),
        (MEMCPY, 230.0, "prefill"),
        (ADD, 250.0, "denoise"),
        (ADD, 260.0, "denoise"),
        (NVJET, 310.0, "other"),
    ]


def test_totals_of_an_uncaptured_call():
    found = profile_of(EAGER, "cuda")

    assert found.kernels.kind == "device_kernels"
    assert found.kernels.total == 6
    counts = {name: count for name, count in found.kernels.by_category.items() if count}
    assert counts == {"gemm": 2, "attention": 1, "elementwise": 2, "memory": 1}
    assert set(found.kernels.by_category) == set(found.kernels.category_ms)
    assert found.kernels.category_ms["gemm"] == pytest.approx(0.050)
    assert found.kernels.category_ms["norm"] == 0
    assert found.kernels.stage_ms == pytest.approx(
        {"vision": 0.040, "prefill": 0.025, "denoise": 0.007, "other": 0.010}
    )
    assert sum(found.kernels.stage_ms.values()) == pytest.approx(
        sum(found.kernels.category_ms.values())
    )
    assert found.notes == []


def test_counts_per_stage_sum_to_the_total():
    found = profile_of(EAGER, "cuda").kernels
    assert found.by_stage == {"vision": 1, "prefill": 2, "denoise": 2, "other": 1}
    assert sum(found.by_stage.values()) == found.total
    assert profile_of(REPLAY, "cuda").kernels.by_stage == {}


def test_idle_time_is_what_no_kernel_covers():
    kernels = profile_of(EAGER, "cuda").kernels
    # 150-190, 200-220, 230-235, 250-253, 260-264, 310-320
    assert kernels.busy_ms == pytest.approx(0.082)
    assert kernels.idle_ms == pytest.approx(0.088)
    assert kernels.longest_gap_ms == pytest.approx(0.046)
    assert kernels.counted_on == "call"


def spans(*pairs: tuple[float, float]) -> Timeline:
    return Recording.of([kernel("k", start, dur, 0) for start, dur in pairs]).kernels()


@pytest.mark.parametrize(
    ("timeline", "busy", "gaps"),
    [
        (spans((5, 10)), 10, []),
        (spans((0, 10), (2, 3)), 10, [0]),  # inside, on another stream
        (spans((0, 10), (5, 10)), 15, [0]),
        (spans((0, 10), (10, 5), (20, 1)), 16, [0, 5]),
        (spans((20, 1), (0, 4), (6, 4)), 9, [2, 10]),
        (spans(), 0, []),
    ],
)
def test_gaps_over_all_streams(timeline, busy, gaps):
    assert timeline.shares_us().sum() == busy
    assert timeline.gaps_us().tolist() == gaps


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=12))
def test_busy_and_idle_against_counting_each_microsecond(pairs):
    covered = {at for start, duration in pairs for at in range(start, start + duration)}
    first, last = min(s for s, _ in pairs), max(s + d for s, d in pairs)
    found = spans(*pairs)
    assert found.shares_us().sum() == len(covered)
    assert len(covered) + found.gaps_us().sum() == last - first


def test_on_rocm_a_replay_that_hides_its_kernels_is_counted_without_its_graph():
    hidden = [runtime("hipGraphLaunch", 20.0, 2), copy(25.0, 1.0, 1), copy(112.0, 1.0, 3)]
    found = profile_of_replay_on_rocm(hidden, EAGER)
    eager = profile_of(EAGER, "rocm")
    assert found.kernels.counted_on == "uncaptured"
    assert found.kernels.by_category == eager.kernels.by_category
    assert found.kernels.by_stage == eager.kernels.by_stage
    assert found.kernels.busy_ms == eager.kernels.busy_ms
    assert found.kernels.idle_ms is None
    assert "without its graph" in found.notes[-1]
    alone = [runtime("hipGraphLaunch", 20.0, 2)]
    assert profile_of_replay_on_rocm(alone, EAGER).kernels == found.kernels


def test_on_rocm_a_replay_that_shows_its_kernels_counts_itself():
    found = profile_of_replay_on_rocm(REPLAY, EAGER)
    assert found.kernels.counted_on == "call"
    assert found.kernels.total == 8
    assert found.kernels.idle_ms is not None
    assert found.kernels.stage_ms != {}


@pytest.mark.parametrize("without", [None, REPLAY])
def test_on_rocm_a_capture_that_cannot_be_left_out_is_said(without):
    found = profile_of_replay_on_rocm(REPLAY, without)
    assert "may be too low" in found.notes[-1]


def test_table_has_the_longest_first():
    rows = table_of(kernels_in(EAGER), "cuda")
    assert [(row.name, row.category, row.calls) for row in rows] == [
        (NVJET, "gemm", 2),
        (FLASH, "attention", 1),
        (ADD, "elementwise", 2),
        (MEMCPY, "memory", 1),
    ]
    assert rows[2].total_ms == pytest.approx(0.007)


def test_a_replay_counts_all_kernels_of_the_graph_and_has_no_stages():
    found = profile_of(REPLAY, "cuda")
    assert found.kernels.total == 8
    assert found.kernels.by_category["memory"] == 3
    assert found.kernels.stage_ms == {}
    assert set(found.timeline.staged) == {None}
    assert len(found.notes) == 1
    assert "no marker" in found.notes[0]


def test_a_replay_takes_its_stages_from_the_same_kernels_uncaptured():
    found = with_stages_of(profile_of(REPLAY, "cuda"), profile_of(EAGER, "cuda"))

    inner = ["vision", "prefill", "prefill", "denoise", "denoise", "other"]
    assert found.timeline.staged == ["other", *inner, "other"]
    assert found.kernels.stage_ms == pytest.approx(
        {"other": 0.011, "vision": 0.038, "prefill": 0.024, "denoise": 0.004}
    )
    assert found.kernels.total == 8
    assert "by the order" in found.notes[0]


@pytest.mark.parametrize("change", ["gone", "renamed", "swapped"])
def test_a_replay_of_other_kernels_has_no_stages(change):
    events = [dict(event) for event in REPLAY]
    if change == "gone":
        del events[4]
    elif change == "renamed":
        events[4]["name"] = "nvjet_tst_64x64"
    else:
        events[4]["name"], events[5]["name"] = events[5]["name"], events[4]["name"]

    found = with_stages_of(profile_of(events, "cuda"), profile_of(EAGER, "cuda"))

    assert found.kernels.stage_ms == {}
    assert len(found.notes) == 1
    assert "not the same" in found.notes[0]


def test_no_stages_where_neither_has_markers():
    replay = profile_of(REPLAY, "cuda")
    found = with_stages_of(replay, replay)
    assert found.kernels == replay.kernels
    assert found.notes == ["No stages: the call without its graph has none either."]


def test_a_graph_launched_inside_a_marker_belongs_to_its_stage():
    found = profile_of([marker("denoise", 15.0, 10.0), *REPLAY], "cuda")
    assert found.kernels.stage_ms == pytest.approx({"other": 0.002, "denoise": 0.075})


def test_the_innermost_marker_decides():
    events = [
        marker("denoise", 0.0, 100.0),
        marker("vision", 10.0, 20.0),
        runtime("cudaLaunchKernel", 12.0, 1),
        runtime("cudaLaunchKernel", 50.0, 2),
        kernel(ADD, 20.0, 1.0, 1),
        kernel(NVJET, 60.0, 1.0, 2),
    ]
    assert kernels_in(events).staged == ["vision", "denoise"]


def test_a_marker_of_another_thread_does_not_count():
    events = [
        {**marker("vision", 0.0, 100.0), "tid": 200},
        marker("prefill", 50.0, 10.0),
        runtime("cudaLaunchKernel", 20.0, 1),
        kernel(ADD, 30.0, 1.0, 1),
    ]
    assert kernels_in(events).staged == ["other"]


def test_the_operator_stands_in_for_a_launch_that_was_not_recorded():
    events = [
        marker("vision", 0.0, 100.0),
        operator("aten::mm", 10.0, 5.0, **{"External id": 9}),
        kernel(NVJET, 30.0, 1.0, 1, args={"External id": 9}),
    ]
    assert kernels_in(events).staged == ["vision"]


def test_one_kernel_of_unknown_launch_leaves_no_stages():
    found = profile_of([*EAGER, kernel(ADD, 400.0, 1.0, 99)], "cuda")
    assert found.kernels.total == 7
    assert found.kernels.stage_ms == {}
    assert found.notes == ["No stages: the launch of 1 kernels is not in the trace."]


@pytest.mark.parametrize(
    "name", ["cudaLaunchKernel", "cuLaunchKernelEx", "hipGraphLaunch", "hipExtModuleLaunchKernel"]
)
def test_a_launch_without_a_kernel_is_noticed(name):
    found = profile_of([*EAGER, runtime(name, 305.0, 50)], "cuda")
    assert found.notes == ["Counts are too low: 1 launches have no kernel in the trace."]


def test_calls_that_launch_nothing_are_not_missed():
    quiet = [runtime("cudaLaunchHostFunc", 305.0, 50), runtime("cudaStreamIsCapturing", 306.0, 51)]
    assert profile_of([*EAGER, *quiet], "cuda").notes == []


def test_operator_calls_are_the_outermost_of_their_thread():
    events = [
        marker("vision", 0.0, 50.0),
        operator("aten::linear", 10.0, 30.0),
        operator("aten::addmm", 12.0, 20.0),
        operator("aten::gelu", 40.0, 5.0),  # starts in the nanosecond in which linear ends
        operator("Torch-Compiled Region: 0/0", 60.0, 30.0),
        operator("aten::mm", 61.0, 5.0),
        operator("profiler::_record_function_enter_new", 67.0, 1.0),
        operator("openpi_opt::rms_norm", 70.0, 5.0),
        {**operator("aten::copy_", 15.0, 5.0), "tid": 200},
    ]
    found = operators_in(events)
    assert list(zip(found.launched, found.duration_us, found.staged, strict=True)) == [
        ("aten::linear", 30.0, "vision"),
        ("aten::copy_", 5.0, "other"),
        ("aten::gelu", 5.0, "vision"),
        ("aten::mm", 5.0, "other"),
        ("openpi_opt::rms_norm", 5.0, "other"),
    ]


def test_operators_that_start_together_are_one_call():
    events = [operator("aten::zero_", 10.0, 3.0), operator("aten::zeros", 10.0, 5.0)]
    assert operators_in(events).launched == ["aten::zeros"]


def test_nesting_is_exact_at_the_size_of_real_timestamps():
    start = 4367755648225.761
    events = [
        operator("aten::mul", start, 0.239),
        operator("aten::view", start + 0.239, 0.09),
        operator("aten::add", start + 0.1, 0.139),
    ]
    assert operators_in(events).launched == ["aten::mul", "aten::view"]


def test_generated_loops_on_a_cpu_are_said_to_be_missing():
    events = [
        operator("aten::mm", 10.0, 3.0),
        operator("## Call CompiledFxGraph fabc ##", 20.0, 3.0),
    ]
    notes = profile_of(events, "cpu").notes
    assert "Inductor" in notes[0]
    assert "no marker" in notes[1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_empty_profile_is_an_error(device):
    with pytest.raises(ProfileError, match=r"recorded no (operator call|device kernel)"):
        profile_of([marker("vision", 0.0, 10.0)], device)


@pytest.mark.parametrize(
    "damage", [{"dur": -1.0}, {"dur": None}, {"ts": "1"}, {"name": None}, {"dur": float("nan")}]
)
def test_a_damaged_event_is_an_error(damage):
    with pytest.raises(ProfileError, match="Damaged event"):
        profile_of([*EAGER, {**kernel(ADD, 1.0, 1.0, 1), **damage}], "cuda")


def test_one_unknown_stage_leaves_the_stages_empty():
    timeline = kernels_in([*EAGER, kernel(ADD, 400.0, 1.0, 99)])
    assert kernels_of(timeline, "cuda").stage_ms == {}
    assert kernels_of(timeline.rows(slice(-1)), "cuda").stage_ms != {}


NAMES = st.lists(st.sampled_from(["a", "b", "c", "Memset (Device)"]), min_size=1, max_size=20)


@given(
    names=NAMES.map(lambda names: ["a", *names, "b"]),
    before=st.lists(st.sampled_from(sorted(COPIES)), max_size=4),
    after=st.lists(st.sampled_from(sorted(COPIES)), max_size=4),
)
def test_copies_around_a_replay_do_not_matter(names, before, after):
    reference = [(name, f"stage {i}") for i, name in enumerate(names)]
    stages = stage_by_sequence(reference, [*before, *names, *after], COPIES)
    known = [stage for _, stage in reference]
    assert stages == ["other"] * len(before) + known + ["other"] * len(after)


@given(names=NAMES, replayed=NAMES)
def test_stages_need_the_same_kernels(names, replayed):
    stages = stage_by_sequence([(name, "s") for name in names], replayed, COPIES)
    core = " ".join(names).replace("Memset (Device)", "").split()
    if core != " ".join(replayed).replace("Memset (Device)", "").split() or not core:
        assert stages is None


def test_a_copy_inside_must_agree():
    reference = [("a", "s"), ("Memset (Device)", "s"), ("b", "t")]
    assert stage_by_sequence(reference, ["a", "b"], COPIES) is None


def test_a_graph_runs_small_copies_as_kernels():
    """Seen on an H100: other names for copies and fills in the replay than on the stream."""
    reference = [("a", "vision"), (MEMCPY, "prefill"), ("Memset (Device)", "p"), ("b", "denoise")]
    replayed = [MEMCPY, "a", "memcpy32_post", "Memset (Unknown)", "b", MEMCPY]
    assert stage_by_sequence(reference, replayed, COPIES) == [
        "other", "vision", "prefill", "p", "denoise", "other",
    ]  # fmt: skip
    exchanged = [MEMCPY, "a", "Memset (Unknown)", "memcpy32_post", "b", MEMCPY]
    assert stage_by_sequence(reference, exchanged, COPIES) is None


def test_copies_at_the_border_of_the_call_itself_keep_their_stage():
    copy_in, clear = sorted(COPIES)
    reference = [(clear, "vision"), ("a", "vision"), ("b", "denoise"), (clear, "denoise")]
    replayed = [copy_in, clear, "a", "b", clear, copy_in]
    assert stage_by_sequence(reference, replayed, COPIES) == [
        "other", "vision", "vision", "denoise", "denoise", "other",
    ]  # fmt: skip
    # Without the call's own copies there is nothing to take over for the border.
    assert stage_by_sequence(reference, [copy_in, "a", "b"], COPIES) == [
        "other", "vision", "denoise",
    ]  # fmt: skip


def test_moments_of_overlapping_kernels_count_once():
    """A kernel that starts beside its predecessor and waits for it is not busy twice."""
    timeline = spans((0.0, 10.0), (4.0, 9.0), (5.0, 2.0), (20.0, 5.0))
    assert timeline.shares_us().tolist() == [10.0, 3.0, 0.0, 5.0]
    kernels = kernels_of(timeline, "cuda")
    assert kernels.busy_ms == pytest.approx(0.018)
    assert kernels.busy_ms == pytest.approx(sum(kernels.category_ms.values()))
    assert sum(row.total_ms for row in table_of(timeline, "cuda")) == pytest.approx(0.018)
