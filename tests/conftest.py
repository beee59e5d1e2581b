"""What all tests share."""

import contextlib
import ctypes
import dataclasses
import signal
from typing import Any

import pytest
from hosts import Host
from hypothesis import settings
from mlflow_server import Server

from openpi_opt.process.devices import LEASES_VARIABLE
from openpi_opt.process.environment import KEPT_MEMORY

# A deadline for an example would fail on a machine that others use, too.
settings.register_profile("openpi_opt", parent=settings(), deadline=None)
settings.load_profile("openpi_opt")

# The longest files begin first: a file stays on one worker, and the short ones fill up its
# neighbour's time at the end.
LONGEST = (
    "test_verbs", "test_power", "test_triton_interpreter", "test_contract", "test_survives",
    "test_real_trials", "test_attacks", "test_notebooks", "test_simplify", "test_remote",
    "test_copies", "test_schedule", "test_interrupted", "test_engine_faults", "test_triton_compile",
    "test_compile", "test_trial", "test_known_results", "test_instances", "test_mlflow_log",
)  # fmt: skip

# As in a trial: page faults were a fifth of what a policy takes in tests. Numbers of malloc.h.
for number, bytes_kept in zip((-3, -1), map(int, KEPT_MEMORY.values()), strict=True):
    with contextlib.suppress(AttributeError):  # a libc without it
        ctypes.CDLL(None).mallopt(number, bytes_kept)

# A run in the background of a script, or by nohup, ignores these two, and so would all programs
# that tests start. What is handled, and not ignored, begins in them as usual.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, and all else as it was."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True, scope="session")
def _leases_of_our_own(tmp_path_factory):
    """Tests are not to wait for sweeps on this host, nor sweeps for tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "leases"
        patch.setenv(LEASES_VARIABLE, str(folder))
        yield folder


@pytest.fixture
def host(tmp_path):
    """A host whose sweeps leave no process."""
    host = Host(tmp_path)
    yield host
    assert host.processes() == []


@pytest.fixture
def mlflow_server(tmp_path):
    """MLflow's server, running."""
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    yield server
    server.signal(signal.SIGKILL)


class _NoCopies:
    def __init__(self, *arguments: object, **more: object):
        pass

    def close(self, *arguments: object, **more: object) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_copies_in_this_process(request, monkeypatch):
    """A process for each of hundreds of small sweeps would take minutes; `copies` has it back."""
    if "copies" not in request.fixturenames:
        for module in ("engine.study", "confirm.fresh"):
            monkeypatch.setattr(f"openpi_opt.{module}.Copies", _NoCopies)


@pytest.fixture
def copies():
    """Sweeps in this process make their copies for MLflow and Optuna."""


def _layers(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    from openpi_opt.pi0.config import MODELS

    for name in ("pi0_mini", "pi05_mini"):
        whole = MODELS[name]
        parts = {part: getattr(whole, part) for part in ("vision", "language", "expert")}
        flat = {part: dataclasses.replace(config, depth=depth) for part, config in parts.items()}
        monkeypatch.setitem(MODELS, name, dataclasses.replace(whole, **flat))


@pytest.fixture
def one_layer(monkeypatch):
    """The small models have one layer a tower: a compiler has no more to see."""
    _layers(monkeypatch, 1)


@pytest.fixture
def two_layers(monkeypatch):
    """The small models have two layers a tower: the last one, and one that is not the last."""
    _layers(monkeypatch, 2)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile traces, and generates no code: a compiler takes its time."""
    import torch

    compile_ = torch.compile

    def trace(function: Any, **settings: Any) -> Any:
        return compile_(function, fullgraph=True, dynamic=False, backend="eager")

    monkeypatch.setattr(torch, "compile", trace)
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def home_of_our_own(tmp_path_factory):
    """Policies that are loaded remember in the user's cache that the guard has passed them."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "home"
        patch.setenv("HOME", str(folder))
        yield folder
