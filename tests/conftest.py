"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from openpi_opt.search.devices import LEASES_VARIABLE

# How long an example takes is a matter of what else the machine does, and no property.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


@pytest.fixture(autouse=True, scope="session")
def _leases_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests are not to wait for sweeps on this host, nor sweeps for tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "leases"
        patch.setenv(LEASES_VARIABLE, str(folder))
        yield folder
