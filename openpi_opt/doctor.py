"""Look this machine over: `python -m openpi_opt.doctor`.

Machine, drivers, packages, and what would spoil a sweep or its numbers, each with ok, warning or
problem and the mend. It needs nothing but Python: what is missing is among what it reports.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from openpi_opt.audit import Finding, audit, this_host
from openpi_opt.cli import run
from openpi_opt.verbs import verb_parser

PROBLEM = 1
_WIDTH = 100
_INDENT = " " * 9


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings on stdout; 1 when one is a problem, else 0."""
    arguments = _parser().parse_args(argv)
    findings = audit(this_host())
    count = Counter(finding.status for finding in findings)
    if arguments.json:
        document = {
            "problems": count["problem"],
            "warnings": count["warning"],
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(document, indent=1))
    else:
        print(report(findings))
    return PROBLEM if count["problem"] else 0


def report(findings: Sequence[Finding]) -> str:
    """The findings by area, and how many are not ok."""
    lines: list[str] = []
    for area in dict.fromkeys(finding.area for finding in findings):
        lines.append(area)
        for finding in findings:
            if finding.area == area:
                lines += _lines(finding)
    count = Counter(finding.status for finding in findings)
    lines.append(f"{_number(count['problem'], 'problem')}, {_number(count['warning'], 'warning')}")
    return "\n".join(lines)


def _lines(finding: Finding) -> list[str]:
    said = textwrap.wrap(
        f"{finding.status:<8} {finding.name}: {finding.what}", _WIDTH,
        initial_indent="  ", subsequent_indent="  " + _INDENT,
    )  # fmt: skip
    if finding.mend:
        said += textwrap.wrap(
            f"mend: {finding.mend}", _WIDTH,
            initial_indent="  " + _INDENT, subsequent_indent="  " + _INDENT + "      ",
        )  # fmt: skip
    return said


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _parser() -> argparse.ArgumentParser:
    parser = verb_parser(
        "doctor",
        description="Machine, drivers, packages, and what would spoil a sweep, with the mends. "
        "Exit code 1 on a problem.",
    )
    parser.add_argument("--json", action="store_true", help="the findings as one JSON document")
    return parser


if __name__ == "__main__":
    run(main)
