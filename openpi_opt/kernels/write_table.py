"""Launch parameters that a search found, as entries of the kernels' tables.

`python -m openpi_opt.kernels --write-table STUDY` takes the fastest trial of the study that gave
the products of fused expert layers launch parameters, and writes them into `TABLE` of
`triton_skinny_gemm` by architecture and shape. What the trial left to the table stays as it is.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.knobs.launch import LINEARS
from openpi_opt.result import Ok, write_atomic
from openpi_opt.track.journal import Record

_TABLE = re.compile(r"^TABLE: dict\[Key, Launch\] = \{\n", re.MULTILINE)


def best(records: list[Record]) -> Record:
    """The fastest ok trial whose launch parameters were given.

    Raises:
        UserError: there is none.
    """
    found = [
        (record.result.latency.mean_ms, record.number, record)
        for record in records
        if isinstance(record.result, Ok) and record.role != "confirm" and _given(record)
    ]
    if not found:
        raise UserError(
            "no ok trial of the study gave launch parameters that a kernel read.\n"
            "Sweep them first: python -m openpi_opt.sweep space=launch preset=NAME"
        )
    return min(found)[2]


def entries(record: Record) -> dict[str, str]:
    """By key of the table, both as source text."""
    from openpi_opt.kernels.launch import LINEAR as READ
    from openpi_opt.kernels.launch import Launch, applied, encoded
    from openpi_opt.kernels.triton_skinny_gemm import TABLE
    from openpi_opt.pi0.config import MODELS

    cfg = Config.load(record.result.config).canonical()
    arch = record.result.fingerprint["gpu"]["arch"]
    expert = MODELS[cfg.model.name].expert
    qkv = (expert.heads + 2 * expert.kv_heads) * expert.head_dim
    features = {"qkv": qkv, "out": expert.width, "gate_up": expert.mlp_width, "down": expert.width}
    folded = cfg.knobs["simplify"].fold_norms and cfg.model.family == "pi0"  # type: ignore[attr-defined]
    gain = "" if folded else ", gain"
    kinds = {"qkv": f"normed{gain}", "gate_up": f"gated{gain}"}
    state = cfg.model.family == "pi0" and not cfg.knobs["simplify"].state_once  # type: ignore[attr-defined]
    rows = cfg.workload.batch_size * (cfg.workload.horizon + state)
    padded = next(size for size in (16, 32, 64) if rows <= size)
    written = {}
    for name, launch in _given(record).items():
        key = (arch, padded, features[name], LINEARS[name], kinds.get(name, "plain"))
        before = TABLE.get(key, Launch(fused=1, dependent=1))  # type: ignore[arg-type]
        after = applied(before, encoded(READ, launch))
        changed = {
            field.name: getattr(after, field.name)
            for field in dataclasses.fields(Launch)
            if getattr(after, field.name) != field.default
        }
        text = ", ".join(f"{field}={value}" for field, value in changed.items())
        written[_text(key)] = f"Launch({text})"
    return written


def write(path: Path, found: dict[str, str], remark: str) -> None:
    """Put entries into the table of the module `path`: in the place of those with their keys.

    Raises:
        UserError: the file has no table, or cannot be written.
    """
    source = path.read_text(encoding="utf-8")
    if not _TABLE.search(source):
        raise UserError(f"{path} has no TABLE to write into.")
    for key in found:
        source = re.sub(rf"^    {re.escape(key)}: .*\n", "", source, flags=re.MULTILINE)
    lines = "".join(f"    {key}: {launch},  # {remark}\n" for key, launch in found.items())
    source = _TABLE.sub(lambda match: match.group() + lines, source, count=1)
    ast.parse(source)  # never leave a module that cannot be imported
    try:
        write_atomic(path, source)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error


def _given(record: Record) -> dict[str, dict[str, int]]:
    """By product, the parameters that the trial gave and a kernel read."""
    gemm = Config.load(record.result.config).canonical().knobs["gemm"]
    launches = gemm.launches()  # type: ignore[attr-defined]
    return {name: launch.given() for name, launch in launches.items() if launch.given()}


def _text(key: tuple[object, ...]) -> str:
    return (
        "(" + ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key) + ")"
    )
