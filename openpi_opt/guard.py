"""What the guard sees with your weights: `python -m openpi_opt.guard`.

Mistakes that optimisations make are made on purpose, one after the other, and go through the guard
as a configuration does. The table says how many times its tolerance each is caught, and what this
guard cannot see. The result is kept in the store, where the trials of the same model, weights and
workload find it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openpi_opt import cli
from openpi_opt.verbs import verb_parser

if TYPE_CHECKING:
    from openpi_opt.guarding.power import Power
    from openpi_opt.track.table import Table

KINDS = ("float32", "bfloat16", "float16", "fp8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when something is missed or an unchanged policy is refused."""
    options = _parser().parse_args(argv)
    from openpi_opt.config import Config
    from openpi_opt.errors import UserError
    from openpi_opt.machine import probe
    from openpi_opt.space.compose import compose
    from openpi_opt.track.store import Store
    from openpi_opt.track.table import margin, markdown, print_table

    unknown = [kind for kind in options.precisions if kind not in KINDS]
    if unknown:
        raise UserError(f"--precisions {unknown[0]}: known are {', '.join(KINDS)}")
    machine = probe()
    if options.config is not None:  # of a sweep that is over; another may measure
        os.nice(19)
        cfg = Config.load(json.loads(options.config))
    else:
        cfg = compose(list(options.overrides)).resolved(machine)
    folder = Store.open(options.store).path / "references"
    folder.mkdir(exist_ok=True)
    from openpi_opt.guarding import power

    gpus = machine.gpus_for(cfg.device)
    arch = gpus[0].arch if gpus else machine.cpu
    if options.seconds is not None:
        some = power.measure_some(cfg, arch, folder, options.seconds)
        print(some.model_dump_json() if options.config is not None else margin(some))
        return 1 if some.missed and options.config is None else 0
    meter = power.Meter(cfg, arch, folder)

    def keep(check: str, mutation: str, multiple: float) -> None:
        if options.out is not None:
            line = json.dumps({"check": check, "mutation": mutation, "multiple": multiple})
            with options.out.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")

    found = meter.measure(options.precisions, cli.say, keep)
    where = gpus[0].name if gpus else f"CPU ({machine.cpu})"
    print(f"{found.model} on {where}, workload {cfg.workload.name}, {found.seconds:.0f} s")
    for line in summary(found):
        print(line)
    if options.table == "markdown":
        print(*markdown(table(found)), sep="\n")
    else:
        print_table(table(found), unfolded={"mutation"})
    refused = [name for name, share in found.honest.items() if share > 1.0]
    return 1 if found.missed() or refused else 0


def summary(power: Power) -> list[str]:
    """What matters of the table, a line each."""
    plain = ", ".join(f"{kind} {value:.3%}" for kind, value in power.plain_rel_l2.items())
    lines = [f"plain eager policy, distance from float32: {plain}"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in power.honest.items())
    lines.append(f"unchanged, share of the tolerance: {shares}")
    for kind in power.plain_rel_l2:
        row = power.smallest(kind)
        lines.append(f"smallest margin in {kind}: {times(row.multiple)} ({row.name})")
    lines.append(cannot_see([(row.name, row.kind) for row in power.missed()]))
    return lines


def cannot_see(missed: Sequence[tuple[str, str]]) -> str:
    """The line under a table: mutations that were missed, with their precisions."""
    if not missed:
        return "this guard sees every mutation"
    names: dict[str, list[str]] = {}
    for name, kind in missed:
        names.setdefault(name, []).append(kind)
    parts = [f"{name} ({', '.join(kinds)})" for name, kinds in names.items()]
    return f"this guard cannot see: {'; '.join(parts)}"


def times(multiple: float) -> str:
    """A multiple of the tolerance."""
    if multiple >= 1e9:
        return "not finite"
    return f"{multiple:,.0f} x" if multiple >= 100 else f"{multiple:.1f} x"


def table(power: Power) -> Table:
    """Rows are mutations; a column for the structure in float32 and for each own precision."""
    from openpi_opt.track.table import Table

    cells: dict[str, dict[str, str]] = {}
    for row in power.rows:
        mine = cells.setdefault(row.name, {})
        mine["float32"] = times(row.form)
        if row.own is not None:
            mark = "" if row.enough else "MISSED " if row.multiple < 1.0 else "weak "
            mine[row.kind] = mark + times(row.own)
    columns = list(dict.fromkeys(["float32", *power.plain_rel_l2]))
    body = [[name, *(mine.get(column, "") for column in columns)] for name, mine in cells.items()]
    return Table(["mutation", *columns], body, frozenset(["mutation"]))


def _parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "guard",
        description="What the guard catches with these weights and this workload, by mistakes made "
        "on purpose.",
    )
    parser.add_argument(
        "overrides", nargs="*", help="as for sweep: model=, weights.path=, workload=, platform="
    )
    parser.add_argument("--store", default="mlruns", help="folder of the store (default: mlruns)")
    parser.add_argument(
        "--precisions",
        type=lambda text: text.split(","),
        default=["float32", "bfloat16", "fp8"],
        help="of float32, bfloat16, float16 and fp8 (default: float32,bfloat16,fp8)",
    )
    parser.add_argument("--out", type=Path, help="a JSON line for each multiple as it comes")
    parser.add_argument(
        "--seconds",
        type=float,
        help="ask the structure alone, the mistakes that are caught by the least first, and begin "
        "none after so many seconds; a later run asks the others",
    )
    parser.add_argument("--config", help=argparse.SUPPRESS)
    parser.add_argument(
        "--table", choices=("terminal", "markdown"), default="terminal", help=argparse.SUPPRESS
    )
    return parser


if __name__ == "__main__":
    cli.run(main, "nothing was kept")
