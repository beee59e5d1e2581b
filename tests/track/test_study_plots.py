"""The best so far and the Pareto set of a study: in tables, as data and plots, and in MLflow."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from track_samples import ENERGY, config, failed, ok, record

from openpi_opt.compare import main
from openpi_opt.config import Config, Tracking
from openpi_opt.criteria import Criteria
from openpi_opt.result import Memory, Ok
from openpi_opt.track import __main__ as verb
from openpi_opt.track import plots, study_plots
from openpi_opt.track.journal import Journal, Record
from openpi_opt.track.mlflow_log import MlflowLog
from openpi_opt.track.report import groups, rows
from openpi_opt.track.store import Store
from openpi_opt.track.table import print_groups

# MLflow 3.17 uses what SQLAlchemy 2.1 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
BOTH = Criteria(objectives=("latency", "memory"))
# Different configurations of one context.
CONFIGS = [
    config(),
    config(attention={"vision": "sdpa"}),
    config(attention={"prefill": "sdpa"}),
    config(fusion={"qkv": True}),
    config(graph={"mode": "manual"}),
]


def sized(mean_ms: float, peak_mib: float, cfg: Config, **more: Any) -> Ok:
    memory = Memory(peak_mib=peak_mib, device_peak_mib=None, host_peak_mib=peak_mib)
    return ok(mean_ms, cfg).model_copy(update={"memory": memory, **more})


def study(*figures: tuple[float, float]) -> list[Record]:
    """Records numbered as given, each of another configuration."""
    measured = [sized(*pair, cfg) for pair, cfg in zip(figures, CONFIGS, strict=False)]
    return [record(result, number=number) for number, result in enumerate(measured)]


def front(records: Sequence[Record], criteria: Criteria = BOTH) -> list[int]:
    return [row.record.number for row in rows(records, criteria=criteria) if row.pareto]


def test_rows_of_the_set_are_marked_and_none_is_best():
    records = study((10, 900), (20, 500), (21, 500), (10, 900), (30, 100))
    assert front(records) == [0, 1, 3, 4], "equal ones belong to it together"
    assert not any(row.best for row in rows(records, criteria=BOTH))
    alone = rows(records)
    assert [row.record.number for row in alone if row.best] == [0]
    assert not any(row.pareto for row in alone)


def test_what_cannot_win_is_not_in_the_set():
    lossy = record(sized(1, 1, config(blas={"backend": "fp8"})), number=3)
    confirm = record(sized(1, 1, CONFIGS[3]), number=4, role="confirm")
    crashed = record(failed(cfg=CONFIGS[4]), number=5)
    records = [*study((10, 900), (20, 500), (30, 600)), lossy, confirm, crashed]
    assert front(records) == [0, 1]
    assert front(records, BOTH.allowing(True)) == [3]
    limited = BOTH.model_copy(update={"limits": {"latency_ms": 15.0}})
    assert front(records, limited) == [0]
    (over,) = [row for row in rows(records, criteria=limited) if row.record.number == 1]
    assert over.over == {"latency_ms": "20.000 ms"}


def test_of_a_configuration_the_newest_measurement_counts():
    again = record(sized(15, 950, CONFIGS[0]), number=2)
    records = [*study((10, 900), (20, 500)), again]
    assert front(records) == [1, 2]
    limited = BOTH.model_copy(update={"limits": {"peak_mib": 920.0}})
    assert front(records, limited) == [1], "the older one is not taken instead"


def test_other_machines_and_contexts_have_sets_of_their_own():
    large = config(workload={"name": "seed_b1", "batch_size": 8})
    older = sized(1, 1, CONFIGS[3], fingerprint={**ok().fingerprint, "cpu": "an older one"})
    records = [
        record(older, number=0),
        *[r.model_copy(update={"number": r.number + 1}) for r in study((10, 900), (20, 500))],
        record(sized(99, 990, large), number=3),
    ]
    assert sorted(front(records)) == [1, 2, 3]


def test_the_table_says_what_is_in_the_set_and_what_is_over(capsys):
    records = study((10, 900), (20, 500), (30, 600))
    criteria = BOTH.model_copy(update={"limits": {"peak_mib": 800.0, "rel_l2": 0.5}})
    print_groups(groups(records, criteria=criteria))
    out = capsys.readouterr().out
    lines = {line.split()[-1]: line for line in out.splitlines() if "ok" in line}
    first, second, third = (line for line in out.splitlines() if " ok" in line)
    assert first.startswith("  0")
    assert "ok over limit" in first
    assert second.startswith("* 1")
    assert third.startswith("  2")
    assert [line.split()[-2:] for line in (first, second, third)] == [
        ["900.0", "0.002"],
        ["500.0", "0.002"],
        ["600.0", "0.002"],
    ], lines
    assert "* Pareto set of latency and memory" in out
    assert "over limits.peak_mib=800, so never best: 0 (900.0 MiB)" in out
    assert "rel_l2" not in out, "nothing is above that one"


def test_what_has_no_energy_is_named_and_not_compared(capsys):
    with_energy = record(sized(30, 1, CONFIGS[1], energy=ENERGY), number=1)
    records = [*study((10, 900)), with_energy]
    criteria = Criteria(objectives=("latency", "energy"))
    assert front(records, criteria) == [1]
    print_groups(groups(records, criteria=criteria))
    assert "no energy of a call, so not compared: 0" in capsys.readouterr().out


@pytest.fixture
def kept(tmp_path):
    """A study of two objectives in a store."""
    study_dir = Store.open(tmp_path).study_dir("s")
    journal = Journal.open(study_dir)
    for item in study((10, 900), (20, 500), (30, 600)):
        journal.append(item)
    BOTH.save(study_dir)
    return study_dir


def test_compare_judges_as_the_sweep_did_or_as_it_is_told(kept, capsys):
    store = str(kept.parent.parent)

    def trials(*words: str) -> list[dict[str, Any]]:
        assert main(["s", "--store", store, "--format", "json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    assert [trial["pareto"] for trial in trials()] == [True, True, False]
    assert trials()[1]["objectives"] == {"latency": 20.0, "memory": 500.0}
    limited = trials("--limit", "peak_mib=550")
    assert [trial["pareto"] for trial in limited] == [False, True, False]
    assert limited[0]["over_limit"] == ["peak_mib: 900.0 MiB"]
    assert [trial["best"] for trial in trials("--objective", "latency")] == [True, False, False]
    assert main(["s", "--store", store, "--format", "csv", "--limit", "peak_mib=550"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["pareto"] for line in lines] == ["False", "True", "False"]
    assert lines[0]["over_limit"] == "peak_mib: 900.0 MiB"
    assert lines[0]["objectives.memory"] == "900.0"


def test_data_and_plots_lie_in_the_study(kept):
    journal = Journal.open(kept)
    files = study_plots.write(kept, journal.records())
    assert [file.name for file in files] == ["pareto.json", "pareto.png", "pareto.svg"]
    assert study_plots.files(kept) == sorted(files)
    document = json.loads(files[0].read_text())
    (context,) = document["contexts"]
    assert [entry["number"] for entry in context["pareto"]] == [0, 1]
    assert document["objectives"] == ["latency", "memory"]
    large = config(workload={"name": "seed_b1", "batch_size": 8})
    journal.append(record(sized(99, 990, large)))
    names = {file.name for file in study_plots.write(kept, journal.records())}
    assert {f"pareto-{large.context_hash()}.png", "pareto.json"} <= names
    Criteria(limits={"peak_mib": 1.0}).save(kept)
    assert study_plots.write(kept, journal.records()) == [], "one objective has no set"


def test_the_plot_shows_every_trial_where_it_is():
    limited = BOTH.model_copy(update={"limits": {"peak_mib": 800.0}})
    (group,) = groups(study((10, 900), (20, 500), (30, 600)), criteria=limited)
    (panel,) = study_plots.pareto_panels(group, lambda row: str(row.record.number))
    (axes,) = plots.draw("scatter", "t", [panel]).axes
    drawn = {
        str(each.get_label()): np.column_stack(each.lines[0].get_data()).tolist()
        for each in axes.containers
    }
    assert drawn == {
        "Pareto set": [[20, 500]],
        "dominated": [[30, 600]],
        "over a limit": [[10, 900]],
    }
    assert [text.get_text() for text in axes.texts] == ["1"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latency, ms", "peak memory, MiB")


def test_marks_in_mlflow_follow_what_is_judged(kept, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store, journal = Store.open(kept.parent.parent), Journal.open(kept)
    log = MlflowLog(store, Tracking())

    def marks() -> tuple[dict[str, str], list[tuple[str, str]]]:
        """Of the parent run, and of each trial: whether in the set, and what is over."""
        found = log.client().search_runs([log.experiment_id()], order_by=["attributes.run_name"])
        tags = [run.data.tags for run in found]
        trials = [t for t in tags if t.get("openpi_opt.role") != "study"]
        own = [(t.get("openpi_opt.pareto", ""), t.get("openpi_opt.over_limit", "")) for t in trials]
        return next(t for t in tags if t.get("openpi_opt.role") == "study"), own

    study_plots.write(kept, journal.records())
    assert log.sync(kept, journal) == 3
    log.show(kept, journal)
    parent, trials = marks()
    assert trials == [("true", ""), ("true", ""), ("", "")]
    assert parent["openpi_opt.pareto"] == "0, 1"
    assert parent["openpi_opt.objectives"] == "latency,memory"
    run_id = log.parent_of(kept)
    artifacts = {item.path for item in log.client().list_artifacts(run_id)}
    assert artifacts == {"pareto.json", "pareto.png", "pareto.svg"}
    assert log.client().get_run(run_id).data.metrics["pareto/trials"] == 2

    BOTH.model_copy(update={"limits": {"latency_ms": 15.0}}).save(kept)
    deleted = log.run_of(journal.records()[2].uid)
    assert deleted is not None
    log.client().delete_run(deleted.info.run_id)
    log.show(kept, journal)
    parent, trials = marks()
    assert trials == [("true", ""), ("", "latency_ms: 20.000 ms")], "a deleted run stays deleted"
    assert parent["openpi_opt.pareto"] == "0"
    assert parent["openpi_opt.limits"] == "latency_ms=15"

    BOTH.save(kept)
    assert verb.main(["sync", "s", "--store", str(store.path)]) == 0
    assert "3 records delivered" in capsys.readouterr().out
    assert marks()[1] == [("true", ""), ("true", "")]


def test_a_study_of_one_objective_without_limits_has_no_marks(tmp_path):
    journal = Journal.open(Store.open(tmp_path).study_dir("s"))
    log = MlflowLog(Store.open(tmp_path), Tracking())
    log.show(journal.study_dir, journal)
    parent = log.client().get_run(log.parent_of(journal.study_dir))
    assert not [tag for tag in parent.data.tags if "pareto" in tag or "limits" in tag]


def timed() -> list[Record]:
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
    found = study_plots.steps(timed(), Criteria())
    assert [(step.number, step.best_ms, step.minutes) for step in found] == [
        (0, 20.0, 1.0),
        (2, 10.0, 3.0),
        (4, 10.0, 4.0),
    ]
    assert [step.number for step in study_plots.steps(timed(), Criteria(allow_lossy=True))] == [
        0,
        2,
        3,
        4,
    ]


def test_the_plot_stands_in_the_studys_folder(tmp_path):
    assert study_plots.write(tmp_path, timed()[:1]) == []
    written = study_plots.write(tmp_path, timed())
    assert sorted(written) == study_plots.files(tmp_path)
    assert [path.suffix for path in study_plots.files(tmp_path)] == [".json", ".png", ".svg"]
    assert len(json.loads((tmp_path / "best_so_far.json").read_text())) == 3
