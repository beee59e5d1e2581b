"""The CSV tables of AMD aiter's tuned GEMMs: read, merge, look up, and write what is to be tuned.

Standard library only: `doctor` and `tune` read them where there is neither torch nor aiter.

aiter merges its own tables when none is named, and takes a named one instead of all of them; it
rewrites what it is given when rows collide, and leaves the result in a folder that all processes of
the host share. So it gets one file, merged here, and a user's rows win.

Source: ROCm/aiter `aiter/jit/core.py` (`get_config_file`, `update_config_files`),
`aiter/tuned_gemm.py` (`get_GEMM_A16W16_config`), `csrc/gemm_a16w16/README.md` at e4048607.
Letters: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from openpi_opt.errors import RefusedError

UNTUNED = ("M", "N", "K", "bias", "dtype", "outdtype", "scaleAB", "bpreshuffle")
COLUMNS = ("cu_num", *UNTUNED, "libtype", "solidx", "splitK", "kernelName")
NAME = "bf16_tuned_gemm"
# aiter's own rule for tables from before the column existed (`gfx_from_cu_num`).
GFX_OF_CUS = {"256": "gfx950", "304": "gfx942", "80": "gfx942"}
Row = dict[str, str]


class Product(NamedTuple):
    """One matrix product of a linear layer, in 16 bits: [m, k] @ [n, k]^T, with a bias or not."""

    m: int
    n: int
    k: int
    bias: bool
    dtype: str = "torch.bfloat16"


def shipped(package: Path) -> list[Path]:
    """The tables that aiter merges when none is named, its general one first."""
    configs = package / "configs"
    models = sorted((configs / "model_configs").glob(f"*{NAME}*.csv"))
    found = [configs / f"{NAME}.csv", *(path for path in models if "untuned" not in path.name)]
    return [path for path in found if path.is_file()]


def read_table(path: Path) -> list[Row]:
    """The rows of a table, with the column `gfx` that newer versions of aiter require.

    Raises RefusedError: columns are missing, the architecture cannot be told, or a row cannot
    run.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise RefusedError(
                    "invalid", f"{path.name} is no table of aiter's: no column {', '.join(missing)}"
                )
            return [_complete(row, path.name, number) for number, row in enumerate(reader, 2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RefusedError("invalid", f"{path} cannot be read: {error}") from error


def merged(package: Path, table: str | None) -> list[Row]:
    """aiter's own rows and those of `table`; one row for each key.

    A row of `table` stands before aiter's own, and among aiter's own the fastest is taken.

    Raises RefusedError: as `read_table`.
    """
    best: dict[tuple[str, ...], Row] = {}
    for path in shipped(package):
        for row in read_table(path):
            known = best.get(_key(row))
            if known is None or _us(row) < _us(known):
                best[_key(row)] = row
    for row in read_table(Path(table)) if table else ():
        best[_key(row)] = row
    return list(best.values())


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write a table that aiter reads; columns that some rows lack are 0 there, as in its merge."""
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["gfx", *COLUMNS]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names, restval="0")
        writer.writeheader()
        writer.writerows(rows)


def write_untuned(path: Path, products: Iterable[Product]) -> int:
    """Write products in the format of aiter's tuner; returns how many."""
    found = sorted(set(products))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(UNTUNED)
        for m, n, k, bias, dtype in found:
            writer.writerow([m, n, k, bias, dtype, dtype, False, False])
    return len(found)


def usable(rows: Iterable[Row], gfx: str, units: int | None) -> list[Row]:
    """Rows that can match on a GPU: of its architecture and its number of compute units."""
    return [
        row for row in rows if row["gfx"] == gfx and (units is None or row["cu_num"] == str(units))
    ]


def served(
    rows: Iterable[Row], gfx: str, units: int, products: Iterable[Product]
) -> dict[Product, str | None]:
    """By product, who computes it as aiter decides; None where it hands the product to torch.

    aiter tries the rows as they are, then padded twice, then its own kernel for vectors.
    """
    known = {
        (int(row["M"]), int(row["N"]), int(row["K"]), row["bias"].lower(), row["dtype"]): row
        for row in usable(rows, gfx, units)
        if row["scaleAB"].lower() == row["bpreshuffle"].lower() == "false"
        and row["outdtype"] == row["dtype"]
    }
    found: dict[Product, str | None] = {}
    for product in products:
        m, n, k, bias, dtype = product
        tries = (known.get((rows_, n, k, str(bias).lower(), dtype)) for rows_ in _padded(m, n))
        unlisted = "skinny" if _for_vectors(m, n, k, units) else None
        found[product] = next((row["libtype"] for row in tries if row), unlisted)
    return found


def _for_vectors(m: int, n: int, k: int, units: int) -> bool:
    """Whether aiter has a kernel without a row (`is_skinny_default_shape`)."""
    if k % 8:
        return False
    if m <= 4:
        return n <= (2 if m == 1 else 1) * units and k <= 9216
    return m <= 16 and n <= units and k <= (5120 if m <= 8 else 256)


def _padded(m: int, n: int) -> tuple[int, int, int]:
    """M, M in steps, and the next power of two (`get_padded_m` with gl 0 and 1)."""
    step = 16 if m <= 256 else 32 if m <= 1024 else 64 if m <= 4096 else 128
    power = 8192 if m > 8192 and n > 4096 else 1 << (m - 1).bit_length()
    return m, -(-m // step) * step, power


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name].lower() for name in ("gfx", "cu_num", *UNTUNED))


def _us(row: Row) -> float:
    try:
        return float(row.get("us") or "inf")
    except ValueError:
        return float("inf")


def _complete(row: Row, name: str, number: int) -> Row:
    if any(value is None for value in row.values()):
        raise RefusedError("invalid", f"{name} line {number}: fewer values than columns")
    if "bshuffle" in row["kernelName"].lower() and row["bpreshuffle"].lower() == "false":
        raise RefusedError(
            "invalid",
            f"{name} line {number}: kernel {row['kernelName']} reads shuffled weights, but the row "
            "says bpreshuffle=False; aiter raises when it is used",
        )
    if row.get("gfx"):
        return row
    if row["cu_num"] not in GFX_OF_CUS:
        raise RefusedError(
            "invalid", f"{name} line {number}: no gfx, and cu_num={row['cu_num']} does not tell it"
        )
    return {**row, "gfx": GFX_OF_CUS[row["cu_num"]]}
