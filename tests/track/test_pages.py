"""What a user sees in a browser: the study in MLflow, and the report. A real headless Chromium."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from track_samples import failed, ok, record

from openpi_opt import report
from openpi_opt.errors import UserError
from openpi_opt.paths import package_dir
from openpi_opt.track import html_report
from openpi_opt.track.html_report import Study
from openpi_opt.track.journal import Journal
from openpi_opt.track.report import groups
from openpi_opt.track.store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install chromium (CI does)"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
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
def page(store: Store) -> Iterator[str]:
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
def test_the_link_opens_the_study_ready_to_read(page: str, tmp_path: Path) -> None:
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
def test_a_report_is_one_file_that_draws_itself(store: Store, tmp_path: Path) -> None:
    path = report.write(store, ["shown"], tmp_path / "out" / "r.html")
    text = seen(path.as_uri(), tmp_path / "profile")
    assert "Best: trial 1 (attention=sdpa), 12.500 ms" in text
    assert "1.60x the baseline" in text
    assert "it &lt;b&gt;broke" in text
    assert text.count("main-svg") >= 3, "plots are drawn"
    assert "Stages against the floor" in text
    assert "<script src" not in path.read_text(encoding="utf-8")


def test_a_report_of_several_studies_and_of_one_that_is_not_there(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["shown", "shown", "--store", str(store.path)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == store.study_dir("shown") / "report" / "report.html"
    assert path.read_text(encoding="utf-8").count("<h2>shown: ") == 2
    with pytest.raises(UserError, match="not in the store"):
        report.main(["absent", "--store", str(store.path)])


def test_best_so_far_falls(store: Store) -> None:
    found = html_report.best_so_far(Study.read(store.study_dir("shown")).trials)
    assert [best for _, best, _ in found] == [20.0, 12.5]


def test_the_knob_that_matters_is_the_important_one() -> None:
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
