"""Real profiles of a small module that marks its stages like the policy."""

import gzip
import json

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import record_function

from openpi_opt.measure.profile import profile_call
from openpi_opt.measure.trace import Recording

STEPS = 4


class Small(torch.nn.Module):
    """Two operators of vision, one of prefill, two in each denoising step, one after."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        with record_function("openpi_opt::vision"):
            x = F.gelu(self.linear(x))
        with record_function("openpi_opt::prefill"):
            x = F.layer_norm(x, (64,))
        for _ in range(STEPS):
            with record_function("openpi_opt::denoise"):
                x = x @ x
                x = x * 0.5
        return x.exp()


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = Small()

    @torch.inference_mode()
    def call(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    return call


def test_operator_calls_of_one_inference_on_a_cpu(small):
    found = profile_call(small, torch.randn(64, 64), "cpu")

    expected = ["aten::linear", "aten::gelu", "aten::layer_norm"]
    expected += ["aten::matmul", "aten::mul"] * STEPS + ["aten::exp"]
    assert found.timeline.launched == expected
    stages = ["vision"] * 2 + ["prefill"] + ["denoise"] * 2 * STEPS + ["other"]
    assert found.timeline.staged == stages
    kernels = found.kernels
    assert kernels.kind == "operator_calls"
    assert kernels.total == len(expected)
    counts = {name: count for name, count in kernels.by_category.items() if count}
    assert counts == {"gemm": 1 + STEPS, "activation": 1, "norm": 1, "elementwise": STEPS + 1}
    assert set(kernels.stage_ms) == {"vision", "prefill", "denoise", "other"}
    assert kernels.by_stage == {"vision": 2, "prefill": 1, "denoise": 2 * STEPS, "other": 1}
    assert kernels.busy_ms is kernels.idle_ms is None
    total_ms = sum(row.total_ms for row in found.table)
    assert 0 < total_ms < 1000
    assert sum(kernels.stage_ms.values()) == pytest.approx(total_ms)
    assert sum(kernels.category_ms.values()) == pytest.approx(total_ms)
    assert found.notes == []


def test_the_trace_is_what_was_counted(small, tmp_path):
    path = tmp_path / "trace.json.gz"
    found = profile_call(small, torch.randn(64, 64), "cpu", trace_path=path)

    with gzip.open(path, "rt", encoding="utf-8") as file:
        document = json.load(file)
    assert Recording.of(document["traceEvents"]).operators().launched == found.timeline.launched
    assert [entry.name for entry in tmp_path.iterdir()] == ["trace.json.gz"]


def test_the_call_runs_twice_and_is_counted_once():
    model = Small()
    found = profile_call(model, torch.randn(64, 64), "cpu")
    assert model.calls == 2
    assert found.timeline.launched.count("aten::exp") == 1


def test_without_markers_there_are_no_stages():
    found = profile_call(torch.exp, torch.randn(8), "cpu")
    assert found.kernels.total == 1
    assert found.kernels.stage_ms == {}
    assert "no marker" in found.notes[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replay_has_the_kernels_and_stages_of_the_call(small):
    x = torch.randn(64, 64, device="cuda")
    model = Small().cuda()

    @torch.inference_mode()
    def call(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    for _ in range(3):
        call(x)
    static = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actions = call(static)

    def replay(x: torch.Tensor) -> torch.Tensor:
        static.copy_(x)
        graph.replay()
        return actions.clone()

    eager = profile_call(call, x, "cuda")
    replayed = profile_call(replay, x, "cuda", uncaptured=call)

    assert eager.notes == []
    assert set(eager.kernels.stage_ms) == {"vision", "prefill", "denoise", "other"}
    inner, whole = (
        found.timeline.rows(~found.timeline.is_copy).launched for found in (replayed, eager)
    )
    assert inner == whole
    assert replayed.kernels.total == eager.kernels.total + 2
    assert set(replayed.kernels.stage_ms) == set(eager.kernels.stage_ms)
    for found in (eager.kernels, replayed.kernels):
        assert sum(found.by_stage.values()) == found.total
        assert found.busy_ms is not None
        assert found.idle_ms is not None
        assert 0 < found.busy_ms <= sum(found.category_ms.values()) + 1e-6
        assert found.idle_ms >= 0
