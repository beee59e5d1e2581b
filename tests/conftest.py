"""What all tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
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
