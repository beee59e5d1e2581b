"""The verbs as subcommands: `openpi-opt VERB ...`, the same as `python -m openpi_opt.VERB ...`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from openpi_opt import cli, interrupt
from openpi_opt.errors import near
from openpi_opt.paths import conf_dir, user_conf_dir
from openpi_opt.track.store import DEFAULT_STORE, Store
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


_BASH = """_openpi_opt() {
  local IFS=$'\\n'
  local words="${COMP_LINE:0:COMP_POINT}"
  COMPREPLY=($(PROGRAM complete "$words" 2>/dev/null))
}
complete -o nospace -F _openpi_opt PROGRAM"""


def bash(program: str) -> str:
    """The lines that a shell evaluates once."""
    return _BASH.replace("PROGRAM", program)


def candidates(arguments: Sequence[str]) -> list[str]:
    """What may stand at the end of the line given, as bash wants it: behind the last `=`."""
    line = arguments[0] if arguments else ""
    *before, last = line.split(" ")
    if len(before) < 2:
        return [f"{name} " for name in VERBS if name.startswith(last)]
    verb = VERBS.get(before[1])
    if verb is None:
        return []
    group, equals, rest = last.partition("=")
    done, _, typed = rest.rpartition(",")
    if equals:
        found = [name for name in _options(group) if name.startswith(typed)]
        return [f"{done}," * bool(done) + name for name in found]
    found = [f"{name}=" for name in _groups() if verb.takes_overrides and name.startswith(last)]
    if verb.takes_study:
        found += [f"{name} " for name in _studies() if name.startswith(last)]
    return found


def _folders() -> list[Path]:
    return [folder for folder in (conf_dir(), user_conf_dir()) if folder.is_dir()]


def _groups() -> list[str]:
    return sorted(
        {path.name for folder in _folders() for path in folder.iterdir() if path.is_dir()}
    )


def _options(group: str) -> list[str]:
    if not group.isidentifier():
        return []
    return sorted({path.stem for folder in _folders() for path in folder.glob(f"{group}/*.yaml")})


def _studies() -> list[str]:
    return Store(Path(DEFAULT_STORE).absolute()).studies()


if __name__ == "__main__":
    sys.exit(main())
