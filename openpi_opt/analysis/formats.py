"""What profilers write besides Chrome traces, read as the kernels of one.

rocprof v1 (`results.json` of --hip-trace, whose events lack a category), rocprofv3 (JSON, CSV and
rocpd databases), and the sqlite export of Nsight Systems. A file is told by its content.
Layouts: ROCm/rocprofiler bin/sqlitedb.py; ROCm/rocprofiler-sdk, rocprofv3's output formats and
rocpd schema; Nsight Systems' exporter documentation.
"""

from __future__ import annotations

import csv
import io
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from openpi_opt.measure.trace import ProfileError

SQLITE_MAGIC = b"SQLite format 3\x00"
SDK_TOOL = "rocprofiler-sdk-tool"
# Columns for name, start and end: of rocprofv3, of rocprof v1.
_CSV_COLUMNS = (
    ("Kernel_Name", "Start_Timestamp", "End_Timestamp"),
    ("KernelName", "BeginNs", "EndNs"),
)


def database_events(path: Path) -> Iterator[dict[str, Any]]:
    """The kernels of a rocpd database or of a sqlite export of Nsight Systems. Raises ProfileError:
    it is neither, or is damaged."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            names = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
            tables = {name for (name,) in database.execute(names)}
            yield from _rows(database, tables)
    except sqlite3.Error as error:
        raise ProfileError(f"damaged database: {error}") from error


def _rows(database: sqlite3.Connection, tables: set[str]) -> Iterator[dict[str, Any]]:
    if "CUPTI_ACTIVITY_KIND_KERNEL" in tables and "StringIds" in tables:
        query = (
            "SELECT s.value, k.start, k.end, k.deviceId, k.streamId FROM "
            "CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.demangledName"
        )
    elif "kernels" in tables:  # a view of every rocpd database
        query = "SELECT name, start, end, agent_id, stream_id FROM kernels"
        columns = {row[1] for row in database.execute("PRAGMA table_info(kernels)")}
        for missing in {"agent_id", "stream_id"} - columns:
            query = query.replace(missing, "0")
    else:
        raise ProfileError(
            "a database without kernels: wanted is rocpd's (rocprofv3 --output-format rocpd, view "
            "`kernels`) or Nsight Systems' (nsys export --type sqlite, CUPTI_ACTIVITY_KIND_KERNEL)"
        )
    for name, start, end, device, stream in database.execute(query):
        yield kernel(name, start, end, device, stream)


def is_csv(head: bytes) -> bool:
    """Whether a file begins with the columns of a kernel trace in CSV."""
    first = head.lstrip(b"\xef\xbb\xbf").split(b"\n", 1)[0].decode(errors="replace")
    columns = next(csv.reader([first]), [])
    return any(set(wanted) <= set(columns) for wanted in _CSV_COLUMNS)


def csv_events(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The kernels of `*_kernel_trace.csv` of rocprofv3 or `results.csv` of rocprof."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
    rows = csv.DictReader(text)
    name, start, end = next(
        wanted for wanted in _CSV_COLUMNS if set(wanted) <= set(rows.fieldnames or ())
    )
    try:
        for row in rows:
            device = row.get("Agent_Id") or row.get("gpu-id") or 0
            yield kernel(row[name], row[start], row[end], device, row.get("Queue_Id", 0))
    except csv.Error as error:
        raise ProfileError(f"damaged CSV: {error}") from error


def sdk_events(tools: Any) -> Iterator[dict[str, Any]]:
    """The kernels of rocprofv3's own JSON: the value of its key `rocprofiler-sdk-tool`."""
    for tool in tools if isinstance(tools, list) else [tools]:
        names = {
            symbol.get("kernel_id"): symbol.get("formatted_kernel_name")
            or symbol.get("kernel_name")
            for symbol in _list(tool, "kernel_symbols")
        }
        for record in _list(_mapping(tool).get("buffer_records"), "kernel_dispatch"):
            about = _mapping(record.get("dispatch_info"))
            yield kernel(
                names.get(about.get("kernel_id")),
                record.get("start_timestamp"),
                record.get("end_timestamp"),
                _mapping(about.get("agent_id")).get("handle", 0),
                _mapping(about.get("queue_id")).get("handle", 0),
            )


def rocprof_kernels(events: Iterable[Any]) -> Iterator[Any]:
    """The events of a Chrome trace. Those of rocprof v1 have neither a category nor numbers: what a
    process named GPU did is a kernel, and gets both."""
    gpus: set[str] = set()
    for event in events:
        if not isinstance(event, dict) or "cat" in event:
            yield event
            continue
        args = _mapping(event.get("args"))
        if event.get("ph") == "M" and str(args.get("name", "")).startswith("GPU"):
            gpus.add(str(event.get("pid")))
        begin, end = args.get("BeginNs"), args.get("EndNs")
        on_gpu = event.get("ph") == "X" and str(event.get("pid")) in gpus
        if on_gpu and begin is not None and end is not None:
            queue = event.get("queue-id", 0)
            yield kernel(event.get("name"), begin, end, event.get("pid"), queue)
        elif event:  # rocprof's first one is empty
            yield event


def kernel(name: Any, start_ns: Any, end_ns: Any, device: Any, stream: Any) -> dict[str, Any]:
    """A kernel as an event of a Chrome trace. Raises ProfileError: no name, or times that are no
    nanoseconds."""
    try:
        start, end = int(start_ns), int(end_ns)
        lane = int(stream or 0)
    except (TypeError, ValueError):
        raise ProfileError(
            f"damaged kernel {str(name)[:60]!r}: from {start_ns!r} to {end_ns!r} ns"
        ) from None
    if not isinstance(name, str) or end < start:
        raise ProfileError(f"damaged kernel {str(name)[:60]!r}: from {start} to {end} ns")
    args = {"device": str(device), "stream": lane}
    times = {"ts": start / 1e3, "dur": (end - start) / 1e3}
    return {"ph": "X", "cat": "kernel", "name": name, "pid": str(device), "args": args, **times}


def named(head: bytes) -> str | None:
    """What a file that is not read is, with the conversion that makes it readable."""
    if head[:1] == b"\x0a" and b"\x00" in head[:256]:
        return (
            "this looks like a Perfetto trace (pftrace). Record it with rocprofv3 --output-format "
            "csv or json, or convert it: `traceconv json FILE FILE.json` of Perfetto"
        )
    if head[:4] == b"NSYS" or b"QDSTRM" in head[:64]:
        return "a report of Nsight Systems: `nsys export --type sqlite FILE` makes one that is read"
    return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any, key: str) -> list[dict[str, Any]]:
    found = _mapping(value).get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
