"""The verbs as subcommands: `openpi-opt VERB ...`, the same as `python -m openpi_opt.VERB ...`."""

from __future__ import annotations

import runpy
import sys

from openpi_opt import cli, interrupt
from openpi_opt.completion import bash, candidates
from openpi_opt.errors import near
from openpi_opt.verbs import VERBS

PROGRAM = "openpi-opt"


def main() -> int:
    """Run a verb, list the verbs, or print what completes a command line."""
    words = sys.argv[1:]
    if words[:1] == ["completion"]:
        print(bash(PROGRAM))
        return 0
    if words[:1] == ["complete"]:
        print("\n".join(candidates(words[1:])))
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(_listing())
        return 0
    verb = words[0]
    if verb not in VERBS:
        text = f"error: {PROGRAM} has no verb {verb!r}.{near(verb, VERBS)}"
        print(f"{text}\n{_listing()}", file=sys.stderr)
        return cli.USER_ERROR
    interrupt.arm()
    sys.argv = [f"{PROGRAM} {verb}", *words[1:]]
    runpy.run_module(f"openpi_opt.{verb}", run_name="__main__", alter_sys=False)
    return 0


def _listing() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb.name:<{width}}  {verb.text}" for verb in VERBS.values()]
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB ...  (or python -m openpi_opt.VERB ...)",
            "",
            *lines,
            "",
            f'{PROGRAM} VERB --help tells more; eval "$({PROGRAM} completion)" completes in bash.',
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
