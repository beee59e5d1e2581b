"""Stages found from the order of kernels alone are those that the kernels really had."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_samples import Scene, replay, rocprof, scene, uncaptured

from openpi_opt.analysis.pattern import STAGES, find_pattern
from openpi_opt.measure.trace import Recording

SCENES: dict[str, dict[str, Any]] = {
    "compiled": {},
    "camera by camera": {"cameras": 3},
    "plain PyTorch": {"kind": "eager"},
    "plain PyTorch, same kernels in prefill and steps": {"kind": "same_kernels"},
    "seven launches a layer": {"kind": "fused"},
    "state token once": {"kind": "fused", "state_once": True},
    "state token once, compiled": {"state_once": True},
    "last prefill layer cut": {"short_last": True},
    "first vision layer differs": {"odd_first": True},
    "four steps": {"steps": 4},
    "every third layer of a step differs": {"every_third": 12},
    "all layers differ by threes": {"every_third": 18},
    "a few layers differ by threes": {"every_third": 15, "kind": "fused"},
}


def stages_of(made: Scene) -> list[str]:
    found = find_pattern(Recording.of(rocprof(made)).kernels())
    assert found is not None
    return [STAGES[i] for i in found.stage]


def differences(made: Scene) -> int:
    true = [stage for stage, _, _ in made.kernels]
    return sum(a != b for a, b in zip(stages_of(made), true, strict=True))


@pytest.mark.parametrize("given_", SCENES.values(), ids=SCENES)
def test_stages_are_the_true_ones(given_):
    # The first layer's extra kernel moves a border by one.
    assert differences(scene(**given_)) <= 1


@pytest.mark.parametrize("given_", SCENES.values(), ids=SCENES)
def test_layers_and_steps_are_counted(given_):
    found = find_pattern(Recording.of(rocprof(scene(**given_))).kernels())
    assert found is not None
    (inference,) = found.inferences
    assert [run.layers for run in inference.vision] == [27] * given_.get("cameras", 1)
    assert inference.prefill[0].layers == 18
    assert len(inference.prefill) == 1 + given_.get("state_once", False)
    assert [run.layers for run in inference.denoise] == [18] * given_.get("steps", 10)
    assert inference.complete == ("steps" not in given_)


@pytest.mark.parametrize("given_", [{}, {"cameras": 2, "kind": "eager"}], ids=str)
def test_several_inferences_are_cut_where_the_device_rests(given_):
    made = scene(**given_).repeated(3)
    found = find_pattern(Recording.of(rocprof(made)).kernels())
    assert found is not None
    assert [inference.begin for inference in found.inferences] == made.begins
    assert all(inference.complete for inference in found.inferences)
    assert differences(made) == 0


def test_a_truncated_trace_says_what_is_visible():
    whole = scene(cameras=2)
    made = whole.first(whole.marks[5][1] + 2 + 11 * 6)  # six layers into the fourth step
    found = find_pattern(Recording.of(rocprof(made)).kernels())
    assert found is not None
    (inference,) = found.inferences
    assert not inference.complete
    assert inference.describe() == (
        "vision 2 x 27 layers, prefill 18 layers, denoise 3 x 18 layers + 6 layers"
    )
    assert differences(made) == 0


def test_a_trace_that_begins_in_the_prefill_has_no_vision():
    whole = scene()
    made = Scene(whole.kernels[whole.marks[1][1] :])
    assert set(stages_of(made)) == {"prefill", "denoise"}
    assert differences(made) == 0


def test_markers_and_pattern_agree():
    made = scene(cameras=3)
    marked = Recording.of(uncaptured(made)).kernels()
    by_markers = [marked.stages[i] for i in marked.stage]
    assert by_markers == [stage for stage, _, _ in made.kernels]
    found = find_pattern(marked)
    assert found is not None
    assert [STAGES[i] for i in found.stage] == by_markers


def test_kernels_that_do_not_repeat_have_no_stages():
    made = Scene()
    made.add("?", [(f"gemm_{i}", 1.0) for i in range(300)])
    assert find_pattern(Recording.of(replay(made)).kernels()) is None
    made.add("?", [("gemm", 1.0), ("norm", 1.0), ("attn_fwd", 1.0), ("gelu", 1.0)] * 40)
    assert find_pattern(Recording.of(replay(made)).kernels()) is None, "one tower is no inference"


WORDS = st.lists(st.sampled_from(["gemm", "attn_fwd", "gelu", "memcpy", "x", "rope"]), max_size=9)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.tuples(WORDS, st.integers(1, 30)), max_size=8))
def test_any_sequence_is_read(parts):
    made = Scene()
    for word, times in parts:
        made.add("?", [(name, 1.0) for name in word * times])
    timeline = Recording.of(rocprof(made)).kernels()
    found = find_pattern(timeline)
    if found is None:
        return
    assert len(found.stage) == len(timeline)
    assert {STAGES[i] for i in found.stage} <= set(STAGES)
    bounds = [(i.begin, i.end) for i in found.inferences]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == len(timeline)
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
