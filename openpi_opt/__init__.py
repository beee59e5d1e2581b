"""Sweep framework for inference optimisations of the Pi0 robot policy."""

from __future__ import annotations

from openpi_opt import interrupt

interrupt.arm_at_start(__name__)  # before anything takes time
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from openpi_opt import sweep
    from openpi_opt.api import Study, load_study
    from openpi_opt.deploy import ReadyPolicy, load_policy
    from openpi_opt.observation import Observation

__all__ = ["Observation", "ReadyPolicy", "Study", "load_policy", "load_study", "sweep"]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for: the verbs must start fast."""
    if name in ("ReadyPolicy", "load_policy"):
        from openpi_opt import deploy

        return getattr(deploy, name)
    if name in ("Study", "load_study"):
        from openpi_opt import api

        return getattr(api, name)
    if name == "sweep":  # the verb's module, which can be called
        import importlib

        return importlib.import_module("openpi_opt.sweep")
    if name == "Observation":
        from openpi_opt.observation import Observation

        return Observation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
