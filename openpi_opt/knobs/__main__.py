"""Print the table of knobs as Markdown: `python -m openpi_opt.knobs`. The README holds it."""

from __future__ import annotations

import inspect

from openpi_opt.knobs import KNOBS
from openpi_opt.knobs.base import AnyKnob
from openpi_opt.paths import conf_dir


def table() -> str:
    """One row per knob, in the order of application: options, keys, first line of the docstring."""
    lines = ["| knob | options | keys | what it does |", "|---|---|---|---|"]
    return "\n".join([*lines, *(_row(knob) for knob in KNOBS)])


def _row(knob: AnyKnob) -> str:
    options = sorted(file.stem for file in (conf_dir() / knob.name).glob("*.yaml"))
    keys = [f"`{knob.name}.{key}`" for key in knob.options_type.model_fields]
    first = (inspect.getdoc(type(knob)) or "").split("\n\n")[0].replace("\n", " ")
    shown = " ".join(f"`{option}`" for option in options)
    return f"| `{knob.name}` | {shown} | {' '.join(keys)} | {first} |"


if __name__ == "__main__":
    print(table())
