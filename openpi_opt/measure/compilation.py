"""What torch.compile did in this process, by Dynamo's own counters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from openpi_opt.result import CacheEntries, CacheState, Compilation

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
    """What was compiled, or None; `late` counts the graphs that were compiled among the samples."""
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


def watch_triton() -> Callable[[], tuple[int, int]]:
    """Count from now on how many Triton kernels come out of its cache, and how many are compiled.

    Returns a function that tells both. Kernels that Inductor's worker processes compile count as
    found: what they were compiled for is a miss of Inductor's own cache.
    """
    from triton import knobs

    counts = {True: 0, False: 0}
    former = knobs.compilation.listener

    def count(**event: Any) -> None:
        counts[bool(event["cache_hit"])] += 1
        if former is not None:
            former(**event)

    knobs.compilation.listener = count
    return lambda: (counts[True], counts[False])


def cache_entries(triton_found: int = 0, triton_compiled: int = 0) -> CacheEntries | None:
    """Compiled code found and made up to now, by the counters of Inductor and those of Triton.

    None when nothing was compiled or loaded.
    """
    found, compiled = triton_found, triton_compiled
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        inductor = dynamo.utils.counters["inductor"]
        # A hit of AOTAutograd's cache spares the look into Inductor's.
        found += inductor["fxgraph_cache_hit"]
        found += dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
        compiled += inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_bypass"]
    return CacheEntries(found=found, compiled=compiled) if found or compiled else None


def cache_state(entries: CacheEntries | None) -> CacheState | None:
    """Whether all code was compiled, none was, or some; None where there was none."""
    if entries is None:
        return None
    return "warm" if entries.compiled == 0 else "cold" if entries.found == 0 else "partly"
