"""What a knob's answer depends on among the other knobs, found by watching what it reads.

A function of a configuration is called with the other knobs undecided. Where it reads one of their
fields, the call is given up and made again for each value that the field can have. What comes out
is a decision tree: its leaves are all answers, each under the conditions that lead to it, and
nothing that was not read is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from openpi_opt.config import Config
from openpi_opt.knobs.base import Options

R = TypeVar("R")
# A field of a knob's options: (knob, path of names); the empty path is all of the options.
Field = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Leaf(Generic[R]):
    """One answer, and the text of every field that was read on the way to it."""

    conditions: tuple[tuple[Field, str], ...]
    answer: R


class UndecidedError(Exception):
    """A field was read that no value was chosen for."""

    def __init__(self, read: Field):
        super().__init__(read)
        self.read = read


def explore(
    function: Callable[[Config], R],
    cfg: Config,
    name: str,
    own: Options,
    candidates: Mapping[str, Sequence[Options]],
) -> list[Leaf[R]]:
    """All answers of `function` for the options `own` of knob `name`.

    `candidates` are the options that each of the other knobs can have.
    """
    return list(_explore(function, cfg, name, own, candidates, {}))


def value_of(options: Options, path: Sequence[str]) -> Any:
    """The value of a field."""
    value: Any = options
    for name in path:
        value = getattr(value, name)
    return value


def text_of(options: Options, path: Sequence[str]) -> str:
    """The value of a field as a text that is equal for equal values."""
    return repr(value_of(options, path))


def _explore(
    function: Callable[[Config], R],
    cfg: Config,
    name: str,
    own: Options,
    candidates: Mapping[str, Sequence[Options]],
    decided: dict[Field, Any],
) -> Iterator[Leaf[R]]:
    watched = cfg.model_copy(update={"knobs": _Knobs(name, own, candidates, decided)})
    try:
        answer = function(watched)
    except UndecidedError as undecided:
        knob, path = undecided.read
        matching: dict[str, list[Options]] = {}
        for options in candidates[knob]:
            matching.setdefault(text_of(options, path), []).append(options)
        for alike in matching.values():
            chosen = {**decided, (knob, path): value_of(alike[0], path)}
            yield from _explore(function, cfg, name, own, {**candidates, knob: alike}, chosen)
        return
    yield Leaf(tuple((read, repr(value)) for read, value in decided.items()), answer)


@dataclass
class _Knobs(Mapping[str, Any]):
    """Stands in for `Config.knobs`: the own options are real, the others are watched."""

    name: str
    own: Options
    candidates: Mapping[str, Sequence[Options]]
    decided: Mapping[Field, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        if name == self.name:
            return self.own
        return _Watched(self, name, (), self.candidates[name][0])

    def __iter__(self) -> Iterator[str]:
        return iter([self.name, *(other for other in self.candidates if other != self.name)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def read(self, knob: str, path: tuple[str, ...]) -> Any:
        """The value of a field; of a part of what is decided, that part.

        Raises:
            UndecidedError: it has none yet.
        """
        for length in range(len(path) + 1):
            if (knob, path[:length]) in self.decided:
                return value_of(self.decided[knob, path[:length]], path[length:])
        raise UndecidedError((knob, path))


class _Watched:
    """Stands in for options of another knob: every use of a field asks which value it has.

    Whatever is no plain reading of a field (a method, a comparison, a text) needs all of them.
    """

    __slots__ = ("_example", "_knob", "_knobs", "_path")

    def __init__(self, knobs: _Knobs, knob: str, path: tuple[str, ...], example: Options):
        self._knobs, self._knob, self._path, self._example = knobs, knob, path, example

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        """What pydantic compares."""
        return dict(self._whole().__dict__)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What `isinstance` asks for."""
        return type(self._example)

    def __getattr__(self, name: str) -> Any:
        path = (*self._path, name)
        if name not in type(self._example).model_fields:
            return getattr(self._whole(), name)
        example = getattr(self._example, name)
        if isinstance(example, Options):
            return _Watched(self._knobs, self._knob, path, example)
        return self._knobs.read(self._knob, path)

    def _whole(self) -> Any:
        return self._knobs.read(self._knob, self._path)

    def __eq__(self, other: object) -> bool:
        return bool(self._whole() == other)

    def __hash__(self) -> int:
        return hash(self._whole())

    def __iter__(self) -> Iterator[Any]:
        return iter(self._whole())

    def __repr__(self) -> str:
        return repr(self._whole())

    def __str__(self) -> str:
        return str(self._whole())
