"""What the Triton kernels take of a GPU, without one: `python -m openpi_opt.kernels --arch LIST`.

Compiles each kernel for each architecture with the parameters it ships with and prints registers,
shared memory (LDS), spills and the occupancy that follows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpi_opt.cli import run
from openpi_opt.errors import UserError
from openpi_opt.track.store import DEFAULT_STORE
from openpi_opt.verbs import verb_parser

if TYPE_CHECKING:
    from openpi_opt.kernels.offline import Arch

DEFAULT = "gfx942,gfx950,sm90"
PROBLEM = 1
WIDTH = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table on stdout; 1 when a kernel has one of `faults`, else 0."""
    arguments = _parser().parse_args(argv)
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not installed: the kernels cannot be compiled\n"
            "make test or make sweep installs both; Triton has wheels for Linux"
        )
    if arguments.write_table is not None:
        return _write_table(arguments.write_table, arguments.store)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise UserError("TRITON_INTERPRET is set: nothing is compiled then; unset it")
    rows = table(_architectures(arguments.arch))
    if arguments.json:
        print(json.dumps({"kernels": rows}, indent=1))
    else:
        show(rows)
    return PROBLEM if any(faults(row) for row in rows) else 0


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row of the table; on AMD by the guide that `instructions` names."""
    found = [] if row["fits"] else ["more shared memory than there is"]
    if row["mix"]:
        found += ["spills"] * bool(row["spilled"])
        found += ["narrow loads"] * bool(row["instructions"]["narrow"])
        found += ["MFMA of 32x32"] * any("_32x32x" in name for name in row["instructions"]["mfma"])
    return found


def _write_table(study: str, store: str) -> int:
    """Put the launch parameters of a study's fastest trial into the shipped tables."""
    from openpi_opt.kernels import write_table
    from openpi_opt.track.journal import Journal
    from openpi_opt.track.store import Store

    study_dir = Store.open(store, create=False).find_study(study)
    record = write_table.best(Journal.read(study_dir).records())
    found = write_table.entries(record)
    for module in dict.fromkeys(entry.module for entry in found):
        own = {entry.key: entry.launch for entry in found if entry.module is module}
        path = Path(str(module.__file__))
        write_table.write(path, own, f"Study {study}, trial {record.number}")
        print(f"{path}: {len(own)} entries of trial {record.number} of study {study}")
        for key, launch in own.items():
            print(f"  {key}: {launch}")
    return 0


def table(archs: Sequence[Arch]) -> list[dict[str, Any]]:
    """A row per kernel, variant and architecture, as plain data."""
    from openpi_opt.kernels.instructions import instructions
    from openpi_opt.kernels.offline import resources, variants
    from openpi_opt.kernels.shipped import CASES, MODULES

    rows = []
    for arch in archs:
        print(f"compiling for {arch.name}", file=sys.stderr)
        compiled: dict[str, dict[str, Any]] = {}
        for case in CASES:
            for variant in variants(case, arch, MODULES):
                if variant.key in compiled:
                    compiled[variant.key]["cases"].append(case.__name__)
                    continue
                binary = variant.compile(arch)
                found = resources(binary, arch)
                mix = instructions(binary.asm["amdgcn"]) if "amdgcn" in binary.asm else None
                compiled[variant.key] = {
                    "arch": arch.name,
                    "kernel": variant.name,
                    "cases": [case.__name__],
                    "constants": {k: str(v) for k, v in variant.constants.items()},
                    "options": dict(variant.options),
                    "blocks": variant.blocks,
                    "units": arch.units,
                    **asdict(found),
                    "instructions": mix and asdict(mix),
                    "mix": mix.text() if mix else "",
                }
        rows += sorted(compiled.values(), key=lambda row: row["kernel"])
    return rows


def _architectures(names: str) -> list[Arch]:
    from triton.backends import backends

    from openpi_opt.kernels.offline import ARCHS

    wanted = list(dict.fromkeys(part.strip() for part in names.split(",") if part.strip()))
    unknown = [name for name in wanted if name not in ARCHS]
    if unknown or not wanted:
        raise UserError(
            f"--arch {names}: {', '.join(unknown) or 'nothing'} is not known; known are "
            f"{', '.join(ARCHS)}, separated by commas"
        )
    archs = [ARCHS[name] for name in wanted]
    lacking = {arch.vendor for arch in archs} - set(backends)
    if lacking:
        raise UserError(
            f"--arch {names}: this build of Triton has no compiler for {', '.join(sorted(lacking))}"
            f", only for {', '.join(sorted(backends))}"
        )
    return archs


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table, at most `WIDTH` wide in a pipe; on a narrow terminal its lines run over."""
    from openpi_opt.track.table import Table, print_table

    heads = ["arch", "kernel", "warps", "regs", "spilled", "shared\nKiB", "waves", "limit",
             "blocks"]  # fmt: skip
    differences = _differences(rows)
    body = []
    longest = max(len(row["kernel"]) for row in rows)
    for row, differs in zip(rows, differences, strict=True):
        occupancy = row["occupancy"]
        shared = f"{row['shared_bytes'] / 1024:.1f}{'' if row['fits'] else ' too much'}"
        body.append([
            row["arch"], row["kernel"], str(row["warps"]),
            str(row["registers"]), str(row["spilled"]), shared,
            f"{occupancy['waves']:g} of {occupancy['most']}", occupancy["limit"],
            str(row["blocks"]),
        ])  # fmt: skip
        body += [["", part, *[""] * 7] for part in textwrap.wrap(differs, longest)]
    texts = frozenset(["arch", "kernel", "limit"])
    print_table(Table(heads, body, texts), WIDTH, unfolded=texts)
    print()
    for row, differs in zip(rows, differences, strict=True):
        if row["mix"]:
            name = " ".join(filter(None, [row["arch"], row["kernel"], differs]))
            print(f"{name}: {row['mix']}")
    judged = [row for row in rows if row["mix"]]
    if judged:
        wrong = Counter(fault for row in judged for fault in faults(row))
        listed = ", ".join(f"{count} with {fault}" for fault, count in wrong.items())
        print(f"{len(judged)} kernels for AMD: {listed or 'no spills, narrow loads or 32x32 MFMA'}")
    units = {row["arch"]: row["units"] for row in rows}
    processors = ", ".join(f"{count} on {arch}" for arch, count in units.items())
    said = (
        "waves: per SIMD on AMD, warps per multiprocessor on NVIDIA; limit: what keeps more from "
        "fitting; regs: per thread, on AMD with the accumulators; loads and LDS: instructions by "
        "bytes per lane, 16 is the most; blocks: of the launch, for processors to share ("
        f"{processors}); nothing was run"
    )
    print(textwrap.fill(said, WIDTH))


def _differences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What tells a row from the others of its kernel and architecture."""
    alike: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        alike[row["kernel"], row["arch"]].append(row["constants"])
    texts = []
    for row in rows:
        others = alike[row["kernel"], row["arch"]]
        own = {
            name: value
            for name, value in sorted(row["constants"].items())
            if any(other.get(name) != value for other in others)
        }
        shown = [n if v == "True" else f"{n}={v}" for n, v in own.items() if v != "False"]
        texts.append(" ".join(shown))
    return texts


def _parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "kernels",
        description="Registers, shared memory, spills and occupancy of each own Triton kernel, "
        "compiled for GPUs that need not be here, and on AMD the instruction mix. Exit code 1 when "
        "one takes more than there is, or on AMD spills, loads narrowly or uses MFMA of 32x32.",
    )
    parser.add_argument(
        "--arch", default=DEFAULT, metavar="LIST", help=f"separated by commas (default: {DEFAULT})"
    )
    parser.add_argument("--json", action="store_true", help="everything, as one JSON document")
    parser.add_argument(
        "--write-table",
        metavar="STUDY",
        help="instead: write the launch parameters of the study's fastest trial into the kernels' "
        "table, by architecture and shape",
    )
    parser.add_argument(
        "--store", default=DEFAULT_STORE, metavar="DIR", help="the study's (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    run(main)
