"""Points of a sweep put together section by section, where that is what Hydra would do.

Hydra composes all groups anew for every point, which takes 80 ms; a search space has thousands.
Overrides of one section (`compile=default compile.scope=call`) change that section only, so each
is composed once and shared by all points. Whatever is not plainly so (presets that write into the
section, interpolations, defaults lists, values that are lists or errors) is left to Hydra, whose
word is final: `Assembler.__call__` returns None.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from openpi_opt.config import SECTIONS, Config
from openpi_opt.errors import UserError
from openpi_opt.knobs import BY_NAME
from openpi_opt.search.space import parse_override

_SCALARS = (str, int, float, bool, type(None))
# Text that Hydra resolves, refuses or moves elsewhere.
_SPECIAL = ("${", "???", "@package")


@dataclass(frozen=True)
class Base:
    """What Hydra composes from the overrides that belong to no single section.

    `values` are its sections as plain data, `choices` the option of each group, `written` the
    sections that a preset's body sets, `roots` the folders of options.
    """

    config: Config
    values: dict[str, Any]
    choices: dict[str, str]
    written: AbstractSet[str]
    roots: tuple[Path, ...]


class Assembler:
    """Makes a configuration out of sections that were composed before."""

    def __init__(self, compose_base: Callable[[list[str]], Base]):
        self._compose_base = compose_base
        self._bases: dict[tuple[str, ...], Base | None] = {}
        self._sections: dict[tuple[tuple[str, ...], str, tuple[str, ...]], BaseModel | None] = {}
        self._options: dict[tuple[str, str], dict[str, Any] | None] = {}

    def __call__(self, overrides: Sequence[str]) -> Config | None:
        """The configuration for these overrides, or None when only Hydra can tell."""
        shared: list[str] = []
        own: dict[str, list[str]] = {}
        for line in overrides:
            head = _head(parse_override(line))
            if head is None:
                shared.append(line)
            else:
                own.setdefault(head, []).append(line)
        base = self._base(tuple(shared))
        if base is None:
            return None
        made = {head: self._section(tuple(shared), head, tuple(own[head])) for head in own}
        known = {head: section for head, section in made.items() if section is not None}
        if len(known) < len(made):
            return None
        knobs = {name: known.get(name, options) for name, options in base.config.knobs.items()}
        sections = {name: section for name, section in known.items() if name in SECTIONS}
        return base.config.model_copy(update={**sections, "knobs": knobs})

    def _base(self, shared: tuple[str, ...]) -> Base | None:
        if shared not in self._bases:
            try:
                base: Base | None = self._compose_base(list(shared))
            except UserError:  # the whole may be right where this part is not
                base = None
            if base is not None and _is_special(base.values):
                base = None
            self._bases[shared] = base
        return self._bases[shared]

    def _section(
        self, shared: tuple[str, ...], head: str, lines: tuple[str, ...]
    ) -> BaseModel | None:
        key = shared, head, lines
        if key not in self._sections:
            base = self._base(shared)
            assert base is not None
            values = self._values(base, head, [parse_override(line) for line in lines])
            self._sections[key] = None if values is None else _validated(head, values)
        return self._sections[key]

    def _values(
        self, base: Base, head: str, overrides: Sequence[Override]
    ) -> dict[str, Any] | None:
        """The section's content: the option chosen last in the defaults list, then single keys."""
        values: dict[str, Any] | None = base.values.get(head)
        choices = [override for override in overrides if override.key_or_group == head]
        if len(choices) > 1 or not isinstance(values, dict):
            return None
        if choices:
            values = self._chosen(base, head, choices[0])
        for override in overrides:
            if values is not None and override.key_or_group != head:
                values = _with_key(values, override)
        return values

    def _chosen(self, base: Base, head: str, override: Override) -> dict[str, Any] | None:
        option = override.value()
        if override.type is not OverrideType.CHANGE or not isinstance(option, str):
            return None
        before = self._option(base, head, base.choices.get(head, ""))
        if head in base.written or before is None or before != base.values[head]:
            return None
        return self._option(base, head, option)

    def _option(self, base: Base, head: str, option: str) -> dict[str, Any] | None:
        """The content of an option's file, if it is the only one of its name and plain data."""
        if (head, option) not in self._options:
            self._options[head, option] = _read(base.roots, head, option)
        return self._options[head, option]


def _head(override: Override) -> str | None:
    """The section that an override changes, or None if it is not one alone."""
    head = override.key_or_group.split(".")[0]
    known = head in SECTIONS or head in BY_NAME
    return head if known and override.package is None and not override.is_delete() else None


def _read(roots: Sequence[Path], head: str, option: str) -> dict[str, Any] | None:
    paths = [path for root in roots if (path := root / head / f"{option}.yaml").is_file()]
    if len(paths) != 1:
        return None
    text = paths[0].read_text(encoding="utf-8")
    if any(mark in text for mark in _SPECIAL):
        return None
    content = OmegaConf.to_container(OmegaConf.create(text)) if text.strip() else None
    if not isinstance(content, dict) or not content or "defaults" in content:
        return None
    return {str(key): value for key, value in content.items()}


def _with_key(values: dict[str, Any], override: Override) -> dict[str, Any] | None:
    """`values` with one key changed (`a.b=1`) or added (`+a.b=1`)."""
    value = override.value()
    if not isinstance(value, _SCALARS) or _is_special(value) or "[" in override.key_or_group:
        return None
    *path, last = override.key_or_group.split(".")[1:]
    changed = copy.deepcopy(values)
    node: Any = changed
    for name in path:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return None
    plain = last in node and not isinstance(node[last], (dict, list))
    fits = {OverrideType.CHANGE: plain, OverrideType.ADD: last not in node}
    if not (fits.get(override.type)):
        return None
    node[last] = value
    return changed


def _is_special(value: Any) -> bool:
    text = json.dumps(value)
    return any(mark in text for mark in _SPECIAL)


def _validated(head: str, values: dict[str, Any]) -> BaseModel | None:
    kind: type[BaseModel] = BY_NAME[head].options_type if head in BY_NAME else SECTIONS[head]
    try:
        return kind.model_validate(values)
    except ValidationError:  # Hydra's way has the message for it
        return None
