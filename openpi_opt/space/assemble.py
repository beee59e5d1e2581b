"""Points of a sweep put together section by section, where that is what Hydra would do.

Hydra composes all groups anew for every point, which takes 80 ms; a search space has thousands.
Overrides of one section (`compile=default compile.scope=call`) change that section only, so each
is composed once and shared by all points: here if it is plain data, else by Hydra. Where a section
is tied to others (interpolations, options that write elsewhere), the whole point is Hydra's:
`Assembler.__call__` returns None.
"""

from __future__ import annotations

import copy
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
from openpi_opt.space.space import parse_override

_SCALARS = (str, int, float, bool, type(None))
# Text that Hydra resolves, refuses or moves elsewhere.
_SPECIAL = ("${", "???", "@package")


@dataclass(frozen=True)
class Composed:
    """What Hydra composes from some overrides.

    `values` are the sections as plain data, `choices` the option of each group, `written` the
    sections that a preset's body sets, `roots` the folders of options; `linked` says that a value
    is taken from another one.
    """

    config: Config
    values: dict[str, Any]
    choices: dict[str, str]
    written: AbstractSet[str]
    roots: tuple[Path, ...]
    linked: bool


class Assembler:
    """Makes a configuration out of sections that were composed before."""

    def __init__(self, by_hydra: Callable[[list[str]], Composed]):
        self._by_hydra = by_hydra
        self._bases: dict[tuple[str, ...], Composed | None] = {}
        self._sections: dict[
            tuple[tuple[str, ...], str, tuple[str, ...]], BaseModel | UserError | None
        ] = {}
        self._options: dict[tuple[tuple[Path, ...], str, str], dict[str, Any] | None] = {}

    def __call__(self, overrides: Sequence[str]) -> Config | None:
        """The configuration for these overrides, or None when only Hydra can tell.

        Raises:
            UserError: Hydra refuses the overrides of one section.
        """
        lines: dict[str | None, list[str]] = {None: []}
        for line in overrides:
            lines.setdefault(_head(parse_override(line)), []).append(line)
        shared = tuple(lines[None])
        base = self._base(shared)
        if base is None:
            return None
        made: dict[str, BaseModel] = {}
        for head, own in lines.items():
            if head is not None:
                section = self._section(base, shared, head, tuple(own))
                if section is None:
                    return None
                made[head] = section
        knobs = {name: made.get(name, options) for name, options in base.config.knobs.items()}
        sections = {name: section for name, section in made.items() if name in SECTIONS}
        return base.config.model_copy(update={**sections, "knobs": knobs})

    def _base(self, shared: tuple[str, ...]) -> Composed | None:
        """What the overrides that belong to no section give, or None where that is not of use."""
        if shared not in self._bases:
            try:
                base: Composed | None = self._by_hydra(list(shared))
            except UserError:  # the whole may be right where this part is not
                base = None
            self._bases[shared] = None if base is None or base.linked else base
        return self._bases[shared]

    def _section(
        self, base: Composed, shared: tuple[str, ...], head: str, lines: tuple[str, ...]
    ) -> BaseModel | None:
        key = shared, head, lines
        if key not in self._sections:
            section: BaseModel | UserError | None = self._plain(base, head, lines)
            if section is None:
                section = self._composed(base, shared, head, lines)
            self._sections[key] = section
        found = self._sections[key]
        if isinstance(found, UserError):
            raise found
        return found

    def _composed(
        self, base: Composed, shared: tuple[str, ...], head: str, lines: tuple[str, ...]
    ) -> BaseModel | UserError | None:
        """The section by Hydra, if the rest stays as it is."""
        try:
            alone = self._by_hydra([*shared, *lines])
        except UserError as error:
            return None if _mentions_others(base.roots, head, lines) else error
        others = (SECTIONS.keys() | BY_NAME.keys()) - {head}
        same = all(_part(alone.config, name) == _part(base.config, name) for name in others)
        return _part(alone.config, head) if same and not alone.linked else None

    def _plain(self, base: Composed, head: str, lines: Sequence[str]) -> BaseModel | None:
        """The section as its option's file has it, with single keys changed; None if unsure."""
        overrides = [parse_override(line) for line in lines]
        choices = [override for override in overrides if override.key_or_group == head]
        values = base.values.get(head)
        if choices and isinstance(values, dict):
            values = self._chosen(base, head, choices)
        if not isinstance(values, dict):
            return None
        changed = copy.deepcopy(values)
        keys = [override for override in overrides if override.key_or_group != head]
        if not all(_set_key(changed, override) for override in keys):
            return None
        kind: type[BaseModel] = BY_NAME[head].options_type if head in BY_NAME else SECTIONS[head]
        try:
            return kind.model_validate(changed)
        except ValidationError:  # Hydra's way has the message for it
            return None

    def _chosen(
        self, base: Composed, head: str, choices: Sequence[Override]
    ) -> dict[str, Any] | None:
        """The content of the option, if it is all that there is to the section."""
        option = choices[0].value()
        plain = len(choices) == 1 and choices[0].type is OverrideType.CHANGE
        if not plain or not isinstance(option, str) or head in base.written:
            return None
        before = self._option(base, head, base.choices.get(head, ""))
        if before is None or before != base.values[head]:
            return None
        return self._option(base, head, option)

    def _option(self, base: Composed, head: str, option: str) -> dict[str, Any] | None:
        key = base.roots, head, option
        if key not in self._options:
            self._options[key] = _read(base.roots, head, option)
        return self._options[key]


def _part(cfg: Config, head: str) -> BaseModel:
    found: BaseModel = cfg.knobs[head] if head in BY_NAME else getattr(cfg, head)
    return found


def _head(override: Override) -> str | None:
    """The section that an override changes, or None if it is not one alone."""
    head = override.key_or_group.split(".")[0]
    known = head in SECTIONS or head in BY_NAME
    return head if known and override.package is None else None


def _read(roots: Sequence[Path], head: str, option: str) -> dict[str, Any] | None:
    """The content of an option's file, if it is the only one of its name and plain data."""
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


def _mentions_others(roots: Sequence[Path], head: str, lines: Sequence[str]) -> bool:
    """Whether what the overrides say, or their options' files, may hang on other sections."""
    chosen = [parse_override(line) for line in lines]
    options = [override.value() for override in chosen if override.key_or_group == head]
    files = [root / head / f"{option}.yaml" for option in options for root in roots]
    texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    return any("${" in text for text in [*lines, *texts])


def _set_key(values: dict[str, Any], override: Override) -> bool:
    """Change one key of `values` (`a.b=1`) or add one (`+a.b=1`); False when it is not plain."""
    value = override.value()
    special = isinstance(value, str) and any(mark in value for mark in _SPECIAL)
    if not isinstance(value, _SCALARS) or special or "[" in override.key_or_group:
        return False
    *path, last = override.key_or_group.split(".")[1:]
    node: Any = values
    for name in path:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return False
    plain = last in node and not isinstance(node[last], (dict, list))
    fits = {OverrideType.CHANGE: plain, OverrideType.ADD: last not in node}
    if not fits.get(override.type):
        return False
    node[last] = value
    return True
