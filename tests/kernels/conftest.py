"""Modules in the place of AMD's aiter, with the names and signatures of the real ones."""

import logging
import sys
import types
from typing import Any

import pytest

from openpi_opt.kernels import tuned_gemm


@pytest.fixture
def put_aiter(monkeypatch):
    """Called with names below `aiter` and their functions; no lookup is known before or after."""

    def put(**content: dict[str, Any]) -> None:
        for name in ("aiter", "aiter.ops", *(f"aiter.{name}" for name in content)):
            module = types.ModuleType(name)
            module.__dict__.update(content.get(name.removeprefix("aiter."), {}))
            monkeypatch.setitem(sys.modules, name, module)

    tuned_gemm.lookups.cache_clear()
    yield put
    logging.getLogger("aiter").removeHandler(tuned_gemm.lookups())
    tuned_gemm.lookups.cache_clear()
