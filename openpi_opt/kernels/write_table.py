"""Launch parameters that a search found, as entries of the kernels' tables.

`python -m openpi_opt.kernels --write-table STUDY` takes the fastest trial of the study that gave
own kernels launch parameters, and writes them into the `TABLE` of each kernel's module by
architecture and shape. What the trial left to the table stays as it is.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from openpi_opt.config import Config
from openpi_opt.errors import UserError
from openpi_opt.knobs.base import Configuration
from openpi_opt.knobs.launch import LINEARS
from openpi_opt.result import Ok, write_atomic
from openpi_opt.track.journal import Record

if TYPE_CHECKING:
    from openpi_opt.kernels.launch import Launch

_WIDTH = 100  # of a line


class Entry(NamedTuple):
    """One entry of the table of a module."""

    module: ModuleType
    key: tuple[str | int, ...]
    launch: Launch


def best(records: list[Record]) -> Record:
    """The fastest ok trial that gave launch parameters. Raises UserError: there is none."""
    found = [
        (record.result.latency.mean_ms, record.number, record)
        for record in records
        if isinstance(record.result, Ok) and record.role != "confirm" and any(_given(record))
    ]
    if not found:
        raise UserError(
            "no ok trial of the study gave launch parameters that a kernel read.\n"
            "Sweep them first: python -m openpi_opt.sweep space=launch preset=NAME"
        )
    return min(found)[2]


def entries(record: Record) -> list[Entry]:
    """What a trial gave, put over what the table or the rule of the kernel says.

    Raises UserError: it ran more than one row of the batch, for which the table of the
    denoising attention has no entries.
    """
    cfg = Config.load(record.result.config).canonical()
    arch = record.result.fingerprint["gpu"]["arch"]
    found = []
    for name, given in _given(record):
        module, call = (_linear if name in LINEARS else _attention)(name, cfg)
        with mock.patch.object(module, "arch", return_value=arch):
            key, before = module.table_key(*call), module.default_launch(*call)
        found.append(Entry(module, key, dataclasses.replace(before, **given)))
    return found


def write(path: Path, found: Mapping[tuple[str | int, ...], Launch], remark: str) -> None:
    """Put entries into the table of the module `path`, in the place of those with their keys.

    Raises UserError: the file cannot be written.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    body = ast.parse("\n".join(lines)).body
    table = next(
        node.value
        for node in body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TABLE"
    )
    assert isinstance(table, ast.Dict)
    for key, value in reversed(list(zip(table.keys, table.values, strict=True))):
        assert key is not None
        if ast.literal_eval(key) in found:
            del lines[key.lineno - 1 : value.end_lineno]
    new = [f"    # {remark}."]
    for shape, launch in found.items():
        new += _lines(shape, launch)
    lines[table.lineno : table.lineno] = new
    text = "\n".join(lines) + "\n"
    ast.parse(text)  # never leave a module that cannot be imported
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error


def _lines(key: tuple[str | int, ...], launch: Launch) -> list[str]:
    from openpi_opt.kernels.launch import Launch

    changed = {
        field.name: getattr(launch, field.name)
        for field in dataclasses.fields(Launch)
        if getattr(launch, field.name) != field.default
    }
    inside = ", ".join(f"{field}={value}" for field, value in changed.items())
    shape = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key)
    whole = f"    ({shape}): Launch({inside}),"
    if len(whole) <= _WIDTH:
        return [whole]
    return [f"    ({shape}): Launch(", f"        {inside}", "    ),"]


def _given(record: Record) -> Iterator[tuple[str, dict[str, int]]]:
    """By product or stage, the parameters that the trial gave and a kernel read."""
    knobs: Mapping[str, Any] = Config.load(record.result.config).canonical().knobs
    launches = knobs["gemm"].launches()
    launches |= {s: knobs["attention"].launch(s) for s in ("vision", "prefill", "denoise")}
    for name, launch in launches.items():
        if launch.given():
            yield name, launch.given()


def _linear(name: str, cfg: Config) -> tuple[Any, tuple[Any, ...]]:
    """The module of a product's kernel, and what its table is asked with."""
    import torch

    from openpi_opt.kernels import triton_skinny_gemm
    from openpi_opt.pi0.config import MODELS

    expert = MODELS[cfg.model.name].expert
    qkv = (expert.heads + 2 * expert.kv_heads) * expert.head_dim
    features = {"qkv": qkv, "out": expert.width, "gate_up": expert.mlp_width, "down": expert.width}
    kind = {"qkv": "normed", "gate_up": "gated"}.get(name, "plain")
    n, k = features[name], LINEARS[name]
    x = torch.empty(cfg.workload.batch_size * _tokens(cfg), k, dtype=torch.bfloat16)
    return triton_skinny_gemm, (x, n, k, kind)


def _attention(stage: str, cfg: Config) -> tuple[Any, tuple[Any, ...]]:
    """The module of a stage's kernel, and what its table is asked with."""
    import torch

    from openpi_opt.kernels import triton_attention, triton_decode
    from openpi_opt.pi0.config import MODELS

    model, rows = MODELS[cfg.model.name], cfg.workload.batch_size
    if stage != "denoise":
        width = (model.vision if stage == "vision" else model.language).head_dim
        return triton_attention, (torch.empty(rows, 1, 1, width, dtype=torch.bfloat16),)
    if rows > 1:
        raise UserError(
            f"the trial's batch is {rows}; the table of the denoising attention is of one row.\n"
            "Write the table from a study of workload.batch_size=1."
        )
    expert = model.expert
    q = torch.empty(1, _tokens(cfg), expert.heads, expert.head_dim, dtype=torch.bfloat16)
    return triton_decode, (q, expert.kv_heads)


def _tokens(cfg: Configuration) -> int:
    """Tokens of a denoising step for each row of the batch."""
    state = cfg.model.family == "pi0" and not cfg.knobs["simplify"].state_once
    return cfg.workload.horizon + state
