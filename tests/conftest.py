"""What all tests share."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Host
from hypothesis import settings

from openpi_opt.process.devices import LEASES_VARIABLE

# A deadline for an example would fail on a machine that others use, too.
settings.register_profile("openpi_opt", parent=settings(), deadline=None)
settings.load_profile("openpi_opt")

# A run in the background of a script, or by nohup, ignores these two, and so would all programs
# that tests start. What is handled, and not ignored, begins in them as usual.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


@pytest.fixture(autouse=True, scope="session")
def _leases_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests are not to wait for sweeps on this host, nor sweeps for tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "leases"
        patch.setenv(LEASES_VARIABLE, str(folder))
        yield folder


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host whose sweeps leave no process."""
    host = Host(tmp_path)
    yield host
    assert host.processes() == []


class _NoCopies:
    def __init__(self, *arguments: object, **more: object):
        pass

    def close(self, *arguments: object, **more: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_copies_in_this_process(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process for each of hundreds of small sweeps would take minutes; `copies` has it back."""
    if "copies" not in request.fixturenames:
        for module in ("engine.study", "confirm.fresh"):
            monkeypatch.setattr(f"openpi_opt.{module}.Copies", _NoCopies)


@pytest.fixture
def copies() -> None:
    """Sweeps in this process make their copies for MLflow and Optuna."""


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small models have one layer a tower: what compiles them has no more to see."""
    from openpi_opt.pi0.config import MODELS

    for name in ("pi0_mini", "pi05_mini"):
        whole = MODELS[name]
        parts = {part: getattr(whole, part) for part in ("vision", "language", "expert")}
        flat = {part: dataclasses.replace(config, depth=1) for part, config in parts.items()}
        monkeypatch.setitem(MODELS, name, dataclasses.replace(whole, **flat))


@pytest.fixture(scope="session")
def home_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Policies that are loaded remember in the user's cache that the guard has passed them."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "home"
        patch.setenv("HOME", str(folder))
        yield folder
