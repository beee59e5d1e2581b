"""Which known results answer after an edit of the package: real sweeps on a copy of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from quick import QUICK

from openpi_opt.paths import conf_dir, package_dir
from openpi_opt.track.journal import Journal

SHORT = (*QUICK, "study=s", "tracking=none", "baseline=false")
NEW_KNOB = '''"""Knob `fresh_air`: an example."""

from openpi_opt.knobs.base import Knob, Options


class FreshAirOptions(Options):
    """Nothing."""

    amount: int = 0


class FreshAir(Knob[FreshAirOptions]):
    """Nothing. All vendors. Source: none."""

    name = "fresh_air"
    options_type = FreshAirOptions
'''


class Copy:
    """A copy of the package, and sweeps of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        pyc = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package_dir(), folder / "openpi_opt", ignore=pyc)
        shutil.copytree(conf_dir(), folder / "conf")

    def edit(self, path: str, old: str, new: str) -> None:
        file = self.folder / path
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    def append(self, path: str, text: str) -> None:
        with (self.folder / path).open("a") as file:
            file.write(text)

    def sweep(self, *words: str) -> tuple[str, str]:
        """Standard output and error of one that succeeds."""
        env = os.environ | {"PYTHONPATH": str(self.folder)}
        command = [sys.executable, "-m", "openpi_opt.sweep", "-m", "attention=eager,sdpa"]
        done = subprocess.run(
            [*command, *words, *SHORT],
            cwd=self.folder, env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    def measured(self) -> list[str]:
        records = Journal.read(self.folder / "mlruns" / "studies" / "s").records()
        return [record.labels["attention"] for record in records]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    found = Copy(tmp_path_factory.mktemp("copy"))
    found.sweep()
    assert found.measured() == ["eager", "sdpa"]
    return found


def test_an_unused_option_a_comment_elsewhere_and_a_new_knob_measure_nothing(copy):
    copy.append("openpi_opt/kernels/capture.py", "\n# A comment.\n")
    copy.edit(
        "openpi_opt/knobs/attention.py",
        "class AttentionOptions(Options):",
        "class AttentionOptions(Options):\n    unused: int = 0\n",
    )
    copy.edit(
        "openpi_opt/config.py",
        "class Workload(Section):",
        "class Workload(Section):\n    unused: int = 0\n",
    )
    (copy.folder / "openpi_opt" / "knobs" / "fresh_air.py").write_text(NEW_KNOB)
    copy.edit(
        "openpi_opt/knobs/__init__.py",
        "KNOBS: tuple[AnyKnob, ...] = (",
        "from openpi_opt.knobs.fresh_air import FreshAir\n\n"
        "KNOBS: tuple[AnyKnob, ...] = (\n    FreshAir(),",
    )
    out, err = copy.sweep()
    assert copy.measured() == ["eager", "sdpa"]
    assert "0 new" in out
    assert err.count("known, not run again") == 2
    assert "known result" not in err


def test_a_changed_kernel_measures_again_what_uses_it_alone(copy):
    copy.append("openpi_opt/kernels/attention.py", "\n# Edited.\n")
    out, err = copy.sweep("--keep-source")
    assert copy.measured() == ["eager", "sdpa"]
    assert "[before kernels/attention.py changed]" in err
    assert "† before kernels/attention.py changed: kept by --keep-source" in out
    out, err = copy.sweep()
    assert "1 known result is measured again: kernels/attention.py changed" in err
    assert copy.measured() == ["eager", "sdpa", "sdpa"]
    assert "1 new" in out
    assert "†" not in out
