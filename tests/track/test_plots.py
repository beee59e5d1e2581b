"""Figures as files: whole, the same for the same data, with the values and intervals given."""

from itertools import pairwise

import numpy as np
import pytest

from openpi_opt.track import plots
from openpi_opt.track.plots import Panel, Point, Series

LINES = Panel(
    "latency",
    [
        Series("a", [Point(1, 10.0, 9.0, 12.0), Point(2, 15.0), Point(64, 100.0, 99.0, 101.0)]),
        Series("b", [Point(1, 8.0, 7.0, 9.0)]),
    ],
    x_label="batch",
    log_x=True,
    log_y=True,
)
BARS = Panel("energy", [Series("a", [Point("1", 2.0), Point("4", 5.0, 4.0, 6.0)])])


def test_lines_and_bars_are_written_whole_and_the_same_again(tmp_path):
    kinds: list[tuple[plots.Kind, Panel]] = [("lines", LINES), ("bars", BARS)]
    for stem, panel in kinds:
        files = plots.save(plots.draw(stem, "t", [panel, panel]), tmp_path / "new", stem)
        assert [file.name for file in files] == [f"{stem}.png", f"{stem}.svg"]
        first = [file.read_bytes() for file in files]
        assert first[0].startswith(b"\x89PNG")
        assert first[1].rstrip().endswith(b"</svg>")
        plots.save(plots.draw(stem, "t", [panel, panel]), tmp_path / "new", stem)
        assert [file.read_bytes() for file in files] == first
    assert len(list((tmp_path / "new").iterdir())) == 4  # nothing temporary is left


def test_intervals_are_drawn_from_low_to_high_and_only_where_given():
    (axes,) = plots.draw("lines", "t", [LINES]).axes
    (segments, _) = (bar.get_children()[-1].get_segments() for bar in axes.containers)
    ends = [segment[:, 1].tolist() for segment in segments]
    assert np.allclose(ends, [[9, 12], [15, 15], [99, 101]])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "64"]
    (axes,) = plots.draw("bars", "t", [BARS]).axes
    assert [bar.get_height() for bar in axes.patches] == [2.0, 5.0]
    assert [text.get_text() for text in axes.texts] == ["2", "5"]


def test_nothing_to_draw_is_an_error():
    for panels in ([], [Panel("x", [])], [Panel("x", [Series("a", [])])]):
        with pytest.raises(ValueError, match="nothing to draw"):
            plots.draw("bars", "t", panels)


@pytest.mark.parametrize("count", [3, 6, 18, 60])
def test_what_is_counted_has_whole_numbers_below_it(count):
    points = [Point(n + 1, 10.0 + n % 3) for n in range(count)]
    (axes,) = plots.draw("dots", "t", [Panel("p", [Series("a", points)])]).axes
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 3, 10])
def test_long_labels_of_bars_stay_within_the_figure(count):
    label = "+ fusion=expert_layer + attention=triton prefill.block_m=64 + gemm=triton_skinny"
    bars = [
        Point(label, 165.0 / (n + 1), 150.0 / (n + 1), 180.0 / (n + 1), "16.50 ms, -12.34%")
        for n in range(count)
    ]
    title = "ladder\npi0 on NVIDIA H100 80GB HBM3, workload three_cameras, 8 fresh processes each"
    figure = plots.horizontal_bars(f"{title}, interleaved", "ms", bars)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    ticks = [tick.get_window_extent() for tick in axes.get_yticklabels()]
    texts = [text.get_window_extent() for text in [*axes.texts, *figure.texts]]
    for box in [*ticks, *texts]:
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
    for upper, lower in pairwise(ticks):
        assert upper.y0 > lower.y1, "labels do not overlap"
