"""Print the table of knobs as Markdown: `python -m openpi_opt.knobs [--write]`.

With `--write` the parts of a checkout that follow from the registry are brought up to date:
the table of docs/sweeping.md, and the knobs among the defaults of `conf/sweep.yaml`.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from openpi_opt.knobs import KNOBS
from openpi_opt.knobs.base import AnyKnob
from openpi_opt.paths import conf_dir

_HEAD = "| knob | options | keys | what it does |\n|---|---|---|---|\n"
# In `conf/sweep.yaml` the knobs stand between these two groups.
_BEFORE, _AFTER = "  - platform: auto\n", "  - measure: default\n"
# Words that YAML 1.1 reads as something else.
_QUOTED = ("off", "on", "yes", "no")


def table() -> str:
    """One row per knob, in the order of application: options, keys, first line of the docstring."""
    return _HEAD + "\n".join(_row(knob) for knob in KNOBS)


def files() -> dict[Path, str]:
    """The files that follow from the registry, as they should be."""
    page, sweep = conf_dir().parent / "docs" / "sweeping.md", conf_dir() / "sweep.yaml"
    text = page.read_text(encoding="utf-8")
    rows = re.escape(_HEAD) + r"(\|.*\n)*"
    found = {page: re.sub(rows, lambda _: table() + "\n", text, count=1)}
    before, _, rest = sweep.read_text(encoding="utf-8").partition(_BEFORE)
    after = rest.partition(_AFTER)[2]
    lines = "".join(f"  - {knob.name}: {_default(knob)}\n" for knob in KNOBS)
    found[sweep] = before + _BEFORE + lines + _AFTER + after
    return found


def _row(knob: AnyKnob) -> str:
    options = sorted(file.stem for file in (conf_dir() / knob.name).glob("*.yaml"))
    keys = [f"`{knob.name}.{key}`" for key in knob.options_type.model_fields]
    first = (inspect.getdoc(type(knob)) or "").split("\n\n")[0].replace("\n", " ")
    shown = " ".join(f"`{option}`" for option in options)
    return f"| `{knob.name}` | {shown} | {' '.join(keys)} | {first} |"


def _default(knob: AnyKnob) -> str:
    """The option that says what the schema's defaults say."""
    from openpi_opt.preset import option_of

    option = option_of(knob, knob.options_type())
    assert option is not None, f"conf/{knob.name}/ has no option that is the default"
    return f'"{option}"' if option in _QUOTED else option


if __name__ == "__main__":
    print(table())
    for path, text in files().items() if "--write" in sys.argv[1:] else ():
        path.write_text(text, encoding="utf-8")
