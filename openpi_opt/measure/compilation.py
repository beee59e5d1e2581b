"""What torch.compile did in this process, by Dynamo's own counters."""

from __future__ import annotations

import sys
from typing import Any

from openpi_opt.result import Compilation

_LIMIT = 100_000  # Dynamo keeps 64 records by default
_REASON = 200  # characters of a graph break's reason


def observe() -> None:
    """Let Dynamo keep a record of each compilation; to be called before the first one."""
    from torch._dynamo import utils

    utils.set_compilation_metrics_limit(_LIMIT)


def graphs() -> int:
    """Graphs compiled so far; 0 where Dynamo was not imported."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    return 0 if dynamo is None else int(dynamo.utils.counters["stats"]["unique_graphs"])


def found(late: int) -> Compilation | None:
    """What was compiled, or None if nothing was; `late` graphs were compiled among the samples."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    compiled = graphs()
    if dynamo is None or compiled == 0:
        return None
    breaks: dict[str, int] = {}
    for reason, count in dynamo.utils.counters["graph_break"].items():
        line = reason.splitlines()[0][:_REASON] if reason else "no reason given"
        breaks[line] = breaks.get(line, 0) + count
    records = dynamo.utils.get_compilation_metrics()
    return Compilation(
        graphs=compiled,
        recompilations=sum(record.recompile_reason is not None for record in records),
        graph_breaks=breaks,
        late=late,
    )
