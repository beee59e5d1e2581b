"""Modules in the place of AMD's aiter, with the names and signatures of the real ones."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from openpi_opt.kernels import tuned_gemm


@pytest.fixture
def put_aiter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
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
