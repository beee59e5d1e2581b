"""What a user sees in a browser: the study in MLflow, and the report. A real headless Chromium."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from track_samples import FINGERPRINT, config, failed, ok, record

from openpi_opt import compare, report
from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.paths import package_dir
from openpi_opt.result import Ok
from openpi_opt.track import html_report, link, plots
from openpi_opt.track.journal import Journal
from openpi_opt.track.left import leave_verdict
from openpi_opt.track.plots import Point
from openpi_opt.track.report import groups
from openpi_opt.track.store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install chromium (CI does)"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A study of a baseline, two faster trials and one that failed."""
    store = Store.open(tmp_path_factory.mktemp("pages") / "mlruns")
    journal = Journal.open(store.study_dir("shown"), ["attention=eager,sdpa"])
    for found, role, params in (
        (ok(20.0), "baseline", {}),
        (ok(12.5), "trial", {"attention": "sdpa"}),
        (ok(15.25), "trial", {"attention": "flash"}),
        (failed("it <b>broke</b>"), "trial", {"attention": "aiter"}),
    ):
        item = record(found, role=role, params=params)
        labels = item.labels | {"attention": params.get("attention", "eager")}
        journal.append(item.model_copy(update={"study": "shown", "labels": labels}))
    return store


def fast() -> Config:
    return config(attention={"vision": "sdpa"})


def seen(url: str, folder: Path) -> str:
    """The text of a page after its scripts have run."""
    assert CHROMIUM is not None
    argv = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", f"--user-data-dir={folder}", "--window-size=2600,1200"),
        *("--virtual-time-budget=30000", "--timeout=120000", "--dump-dom", url),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    return re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)


@pytest.fixture(scope="module")
def page(store):
    argv = [sys.executable, "-m", "openpi_opt.ui", "shown", "--store", str(store.path)]
    with subprocess.Popen(
        [*argv, "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(package_dir().parent)},
        start_new_session=True,
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGINT)


@needs_browser
def test_the_link_opens_the_study_ready_to_read(page, tmp_path):
    assert page.startswith("http://127.0.0.1:")
    text = seen(page, tmp_path)
    assert "3" in re.findall(r"(\d+)</strong> matching run", text) or "matching runs" in text
    for word in ("latency/mean_ms", "vs_baseline", "latency/p99_ms", "openpi_opt.outcome"):
        assert word in text, word
    assert text.index("1 attention=sdpa") < text.index("2 attention=flash") < text.index("0 base")
    for figure in ("12.5", "15.25", "1.6"):
        assert figure in text
    assert "GenAI overview" not in text


@needs_browser
def test_a_report_is_one_file_that_draws_itself(store, tmp_path):
    path = report.write([store.study_dir("shown")], tmp_path / "out" / "r.html")
    text = seen(path.as_uri(), tmp_path / "profile")
    assert "Best: trial 1 (attention=sdpa), 12.500 ms" in text
    assert "1.60x the baseline" in text
    assert "it &lt;b&gt;broke" in text
    assert text.count("main-svg") >= 3, "plots are drawn"
    assert "Stages against the floor" in text
    assert "<script src" not in path.read_text(encoding="utf-8")


def study(store: Store, name: str, *results: tuple[Ok, str]) -> Path:
    journal = Journal.open(store.study_dir(name), ["attention=eager,sdpa"])
    for found, role in results:
        journal.append(record(found, role=role).model_copy(update={"study": name}))
    return journal.study_dir


def test_studies_of_one_machine_share_a_table_and_others_stand_side_by_side(tmp_path, capsys):
    store, elsewhere = (Store.open(tmp_path / name) for name in ("here", "elsewhere"))
    study(store, "one", (ok(20.0), "baseline"), (ok(10.0, fast()), "trial"))
    study(store, "two", (ok(8.0, fast()), "trial"))
    other = {**FINGERPRINT, "triton": "1.0"}
    away = study(elsewhere, "away", (ok(2.0, fp=other), "baseline"))
    names = ["one", "two", str(away), "--store", str(store.path)]
    assert report.main(names) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == store.study_dir("one") / "report" / "report.html"
    text = path.read_text(encoding="utf-8").partition("</script></head>")[2]
    assert text.count("<h2>") == 1 + 2 + 3, "side by side, two groups, three studies"
    assert "two:0 attention=" in text
    assert "2.50x" in text, "against the baseline of the other study on this machine"
    assert "triton: " in text
    assert compare.main(names) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ *one:0 .* 1\.00x$", out, re.MULTILINE)
    assert re.search(r"^\* two:0 .* 2\.50x$", out, re.MULTILINE)
    assert re.search(r"^\* *0 .* 1\.00x$", out, re.MULTILINE), "the other machine's is its own best"
    assert "side by side, each against its own baseline" in out
    for wrong in ("absent", str(tmp_path)):
        with pytest.raises(UserError, match=r"not in the store|no folder of a study"):
            report.main([wrong, "--store", str(store.path)])


def test_a_report_shows_what_ladder_ablate_and_promote_left(store, tmp_path):
    folder = store.study_dir("shown")
    for verb, row in (
        ("ladder", "| + attention=sdpa | 9.500 | +50.00% | +40.00% to +60.00% | faster |"),
        ("ablate", "| attention=sdpa | 19.000 | +100.00% | +90.00% to +110.00% | helps |"),
    ):
        head = "| knob | mean ms | share | interval | verdict |"
        lines = ["of this machine", "", head, "|---|---|---|---|---|", row]
        point = Point("attention=sdpa", 19.0, 18.0, 20.0)
        figure = plots.horizontal_bars(verb, "ms", [point])
        plots.write_report(folder / verb, verb, "\n".join(lines), {}, figure, "")
    leave_verdict(folder, "0" * 32, "fast", {}, "Preset **fast**: 9.500 ms.")
    text = report.write([folder], tmp_path / "r.html").read_text(encoding="utf-8")
    for words in ("+40.00% to +60.00%", "+100.00%", "<td>helps", "Preset fast: 9.500 ms."):
        assert words in text, words
    assert '<td class="n">+50.00%' in re.sub(r"\s*<", "<", text)
    assert text.count("data:image/svg+xml;base64,") == 2


def test_a_link_is_an_address_while_somebody_serves(tmp_path):
    store = Store.open(tmp_path / "mlruns")
    folder = study(store, "shown")
    command = f"python -m openpi_opt.ui shown --store {store.path}"
    link.note_page(folder, None, "#/experiments/1/runs")
    assert link.where(folder) == command
    with link.serving(store.path, "http://127.0.0.1:1"):
        assert link.where(folder) == "http://127.0.0.1:1/#/experiments/1/runs"
    assert link.where(folder) == command
    link.note_page(folder, "https://mlflow.example/", "#/experiments/1/runs")
    assert link.where(folder) == "https://mlflow.example/#/experiments/1/runs"


def test_the_knob_that_matters_is_the_important_one():
    records = [
        record(
            ok(10.0 * (1 + fast) + other / 100),
            params={"a": str(fast), "b": str(other)},
        ).model_copy(
            update={"labels": {"a": str(fast), "b": str(other)}, "number": 2 * other + fast}
        )
        for fast in (0, 1)
        for other in range(6)
    ]
    (group,) = groups(records)
    shares = html_report.importance(group.rows)
    assert shares["a"] > shares["b"]
    times = [row.ok.latency.mean_ms for row in group.rows if row.ok]
    of_a, of_b = ([row.differs[key] for row in group.rows] for key in ("a", "b"))
    assert html_report.effect(of_a, times) > 0.99 > 0.01 > html_report.effect(of_b, times)
    assert html_report.effect(of_a, [7.0] * len(times)) == 0.0
