"""What a sweep on a CPU asks after its table, where it cannot be asked."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from search_samples import ok

from openpi_opt.engine.command import ask_guard
from openpi_opt.machine import probe
from openpi_opt.process.devices import Devices, DeviceSettings, lease
from openpi_opt.result import StructureReport
from openpi_opt.space.compose import compose
from openpi_opt.track.store import Store


@pytest.fixture
def outcome(tmp_path: Path) -> SimpleNamespace:
    """A sweep of one trial, in whose store no reference can be kept."""
    cfg = compose(["model=pi0_mini", "platform=cpu"])
    found = ok(cfg.resolved(probe()), 1.0)
    seen = StructureReport(passed=True, rel_l2=0.0, tolerance=1e-5, case="ordinary 0")
    found = found.model_copy(update={"guard": found.guard.model_copy(update={"structure": seen})})
    store = Store.open(tmp_path / "store")
    (store.path / "references").write_text("no folder")
    store.study_dir("s").mkdir(parents=True)
    return SimpleNamespace(points=[SimpleNamespace(result=found)], store=store, name="s")


@pytest.mark.parametrize(
    ("python", "words"), [(sys.executable, "references"), ("/bin/false", "exit code 1")]
)
def test_what_fails_is_a_line_that_says_what_to_do(outcome, capsys, monkeypatch, python, words):
    monkeypatch.setattr(sys, "executable", python)
    devices = Devices(DeviceSettings(), probe())
    ask_guard(outcome, devices)
    out = capsys.readouterr().out
    assert "could not be measured" in out
    assert words in out
    assert "guard.seconds=0 does not ask" in out
    assert not (outcome.store.study_dir("s") / "guard.json").exists()
    for slot in devices.slots("cpu"):  # given back
        held = lease(slot)
        assert held is not None
        held.release()


def test_cores_on_which_another_measures_are_left_to_it(outcome, capsys):
    devices = Devices(DeviceSettings(), probe())
    other = lease(devices.slots("cpu")[0])
    assert other is not None
    ask_guard(outcome, devices)
    other.release()
    out, err = capsys.readouterr()
    assert "another measures on these cores" in out
    assert "mistakes are made" not in err
