"""Presets: a promoted configuration as a Hydra file, with its provenance.

A preset names an option of each group where the promoted knobs equal one, so that a group on the
command line replaces it as usual. `provenance` says where the figures come from (`confirm.summary`
makes it). It serves to choose a preset and to warn of another machine, never an implementation.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from openpi_opt import cli
from openpi_opt.config import Config, Platform
from openpi_opt.errors import UserError
from openpi_opt.knobs import KNOBS
from openpi_opt.knobs.base import AnyKnob, Options
from openpi_opt.machine import Machine, probe
from openpi_opt.paths import conf_dir, user_conf_dir
from openpi_opt.result import write_atomic
from openpi_opt.space.files import read
from openpi_opt.track.fingerprint import fingerprint

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> None:
    """Raise UserError for a name that is not a plain file name."""
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 64 else name[:40] + "..."
        raise UserError(
            f"preset name {shown!r}: use letters, digits, '.', '_' and '-', starting with a letter "
            "or digit, at most 64 characters."
        )


def preset_path(name: str, folder: Path | None) -> Path:
    """Where the preset called `name` is written: `folder`, or `conf/preset` of the working folder.
    Raises UserError: a name that could leave the folder."""
    check_name(name)
    return (folder or user_conf_dir() / "preset") / f"{name}.yaml"


def check_free(path: Path) -> None:
    """Raise UserError where there is a preset already."""
    if path.exists():
        raise UserError(f"preset {path} exists. Choose another --name, or --force to replace it.")


def write(path: Path, cfg: Config, provenance: dict[str, Any], replace: bool = False) -> None:
    """Write the preset, whole or not at all, and never over another unless `replace`. Raises
    UserError: there is a preset of this name, or the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_atomic(path, render(cfg, provenance), replace)
        except FileExistsError:
            raise UserError(
                f"preset {path} was written by another promotion meanwhile, and is left as it is."
                "\nWhat was measured is kept: the same command with another --name, or --force, "
                "takes no new process."
            ) from None
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}. Choose another --preset-dir."
        ) from error


def render(cfg: Config, provenance: dict[str, Any]) -> str:
    """The YAML text of a preset."""
    defaults: list[Any] = []
    body: dict[str, Any] = {}
    for knob in KNOBS:
        chosen = cfg.canonical().knobs[knob.name]
        option = option_of(knob, chosen)
        if option is None:
            plain = knob.options_type().model_dump(mode="json")
            body[knob.name] = _changed(chosen.model_dump(mode="json"), plain)
        else:
            defaults.append({f"override /{knob.name}": option})
    document = {"defaults": defaults, **body, "provenance": provenance}
    head = (
        f"# @package _global_\n# Written by `python -m openpi_opt.promote {provenance['study']}`.\n"
    )
    return head + yaml.safe_dump(document, sort_keys=False, width=100, allow_unicode=True)


def _changed(values: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from `plain`: the other keys are as the group's default option has them."""
    found = {key: value for key, value in values.items() if value != plain.get(key)}
    return {
        key: _changed(value, plain[key])
        if isinstance(value, dict) and isinstance(plain.get(key), dict)
        else value
        for key, value in found.items()
    }


def option_of(knob: AnyKnob, chosen: Options) -> str | None:
    """The option file of a knob that says exactly `chosen`; keys it leaves out are defaults."""
    for file in sorted((conf_dir() / knob.name).glob("*.yaml")):
        if knob.options_type.model_validate(read(file).body) == chosen:
            return file.stem
    return None


_AUTO = "preset=auto"
# What of a fingerprint decides the latency: a difference is worth a warning.
_DECISIVE = ("torch", "triton", "aiter")


def presets(folders: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The provenance of every preset in `folders`, by name; the first folder wins. A file that is
    not data is left out; asking for it by name says why."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.yaml")):
            try:
                known = read(file).body.get("provenance")
            except UserError:
                continue
            if isinstance(known, dict):
                found.setdefault(file.stem, known)
    return found


def folders(preset_dir: Path | None) -> list[Path]:
    """Where presets are looked for: the given folder, the working folder's, the project's."""
    given = [] if preset_dir is None else [preset_dir]
    return [*given, user_conf_dir() / "preset", conf_dir() / "preset"]


def resolve_auto(overrides: Sequence[str], preset_dir: Path | None) -> list[str]:
    """The overrides with the name of a preset in place of `preset=auto`; says which it is. Raises
    UserError: as `auto`."""
    if _AUTO not in overrides:
        return list(overrides)
    given = dict(word.split("=", 1) for word in overrides if "=" in word)
    known = presets(folders(preset_dir))
    model, workload = (given.get(key) for key in ("model", "workload"))
    gpu = None if given.get("platform") == "cpu" else _gpu(probe(), given.get("platform.gpu"))
    name = auto(known, gpu, None if model == "auto" else model, workload)
    cli.say(f"preset=auto: {name} ({described(known[name])})")
    return [f"preset={name}" if word == _AUTO else word for word in overrides]


def _gpu(machine: Machine, index: str | None) -> str | None:
    """The name of the GPU that is used without further words, or of number `index`."""
    gpus = machine.gpus_for(machine.usable_device())
    number = int(index) if index is not None and index.isdecimal() else 0
    return gpus[number].name if number < len(gpus) else None


def auto(
    known: Mapping[str, Mapping[str, Any]],
    gpu: str | None,
    model: str | None = None,
    workload: str | None = None,
) -> str:
    """The name of the preset for this GPU, model and workload; of several, the fastest.

    Only presets that were measured and are not lossy count. None for `model` or `workload` admits
    any, as long as all that remain are of one.

    Raises UserError: there is none, or presets of different models or workloads remain. Says
    which presets there are.
    """
    measured = {
        name: found
        for name, found in known.items()
        if found.get("mean_ms") and not found.get("lossy")
    }
    asked = {"model": model, "workload": workload}
    fitting = {
        name: found
        for name, found in measured.items()
        if _of(found, "machine", "gpu") == gpu
        and all(wanted in (None, _of(found, part, "name")) for part, wanted in asked.items())
    }
    if len({(_of(p, "model", "name"), _of(p, "workload", "name")) for p in fitting.values()}) == 1:
        return min(fitting, key=lambda name: float(fitting[name]["mean_ms"]))
    words = ", ".join(f"{part} {wanted}" for part, wanted in asked.items() if wanted)
    what = f"{gpu or 'a CPU'}{words and ', '}{words}"
    why = "presets of several models or workloads fit" if fitting else "no measured preset is"
    lines = [f"  {name}: {described(found)}" for name, found in (fitting or measured).items()]
    raise UserError(
        f"preset=auto: {why} for {what}. "
        + ("Say model= and workload=, or one of" if fitting else "There are")
        + (":\n" + "\n".join(lines) if lines else " none.")
    )


def described(found: Mapping[str, Any]) -> str:
    """A preset in a line: GPU, model, workload and mean latency."""
    gpu = _of(found, "machine", "gpu") or _of(found, "machine", "cpu")
    model, workload = (_of(found, part, "name") for part in ("model", "workload"))
    return f"{gpu}, {model}, workload {workload}, {found.get('mean_ms', '?')} ms"


def other_machine(found: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> list[str]:
    """How this machine differs from the one that a preset was promoted on, a line for each. The GPU
    (without one, the CPU), its driver, torch, triton and aiter are compared where both sides know
    them. The preset's figures hold here if the list is empty."""
    gpu = fingerprint["gpu"] or {}
    here: dict[str, Any] = {"gpu": gpu.get("name"), "driver": gpu.get("driver")}
    if not gpu and not _of(found, "machine", "gpu"):
        here["cpu"] = fingerprint["cpu"]
    pairs = [(name, _of(found, "machine", name), value) for name, value in here.items()]
    pairs += [(name, _of(found, "versions", name), fingerprint[name]) for name in _DECISIVE]
    return [
        f"promoted with {name} {_short(then)}, here it is {_short(now) if now else 'absent'}"
        for name, then, now in pairs
        if then is not None and then != now
    ]


def warn(name: str, preset_dir: Path | None, machine: Machine, platform: Platform) -> None:
    """Warn (`UserWarning`) that a preset is used, unmeasured, on another machine than its own."""
    found = presets(folders(preset_dir)).get(name, {})
    differences = other_machine(found, fingerprint(machine, platform))
    if differences:
        warnings.warn(
            f"preset {name}: {'; '.join(differences)}. Its figures may not hold here: measure with "
            f"`python -m openpi_opt.sweep preset={name}`.",
            stacklevel=4,
        )


def _short(value: Any) -> str:
    return str(value.get("version", value)) if isinstance(value, Mapping) else str(value)


def _of(found: Mapping[str, Any], part: str, name: str) -> Any:
    inside = found.get(part)
    return inside.get(name) if isinstance(inside, Mapping) else None
