"""The best so far against minutes."""

import json

from track_samples import config, failed, ok, record

from openpi_opt.criteria import Criteria
from openpi_opt.track import study_plots
from openpi_opt.track.journal import Record


def study() -> list[Record]:
    """Trials at minutes 1, 2, 3, then after a night 1 minute of sweeping later, and a failure."""
    clock = ("00:01", "00:02", "00:03", "09:00", "09:01")
    results = [ok(20.0), ok(30.0), ok(10.0), ok(8.0, config(blas={"backend": "fp8"})), failed("x")]
    return [
        record(result.model_copy(update={"started_at": "2026-01-01T00:00:00+00:00"})).model_copy(
            update={"number": number, "created_at": f"2026-01-01T{time}:00+00:00"}
        )
        for number, (time, result) in enumerate(zip(clock, results, strict=True))
    ]


def test_only_what_may_win_is_the_best_and_pauses_do_not_count():
    found = study_plots.steps(study(), Criteria())
    assert [(step.number, step.best_ms, step.minutes) for step in found] == [
        (0, 20.0, 1.0),
        (2, 10.0, 3.0),
        (4, 10.0, 4.0),
    ]
    assert [step.number for step in study_plots.steps(study(), Criteria(allow_lossy=True))] == [
        0,
        2,
        3,
        4,
    ]


def test_the_plot_stands_in_the_studys_folder(tmp_path):
    assert study_plots.write(tmp_path, study()[:1]) == []
    written = study_plots.write(tmp_path, study())
    assert sorted(written) == study_plots.files(tmp_path)
    assert [path.suffix for path in study_plots.files(tmp_path)] == [".json", ".png", ".svg"]
    assert len(json.loads((tmp_path / "best_so_far.json").read_text())) == 3
