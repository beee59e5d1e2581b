"""How many combinations a space has, how many are sensible, and how many of those differ. Exactly.

A space of billions cannot be walked through. But knobs look at few fields of one another, so a
combination is decided by the value of each knob by itself once the fields that others read (its
face) are given. So: for every combination of faces the sensible combinations are a product over
the knobs, their number is the sum of these products, and their canonical forms are a union of
products of sets. `peek` finds the faces.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from openpi_opt.config import Config
from openpi_opt.knobs import BY_NAME, KNOBS
from openpi_opt.knobs.base import Options
from openpi_opt.machine import Machine
from openpi_opt.space.factors import Base, NotFactorableError, Value, bases
from openpi_opt.space.peek import Leaf, explore, text_of
from openpi_opt.space.points import Compose
from openpi_opt.space.sensible import LeftOut, knob_leaves_out
from openpi_opt.space.space import Space

MAX_FACES = 300_000
MAX_UNION = 2_000_000

Path = tuple[str, ...]
Face = tuple[str, ...]
# What a knob makes of a value: why it is left out, or its canonical form as text.
Answer = LeftOut | str
# A set of canonical forms for the context and each knob: all of their combinations occur.
Box = tuple[frozenset[str], ...]


@dataclass
class Count:
    """`raw` combinations as written, `sensible` ones, and `distinct` configurations among them.

    `left_out` has the number of raw combinations for each reason, the first knob's where several
    have one. `alive` are the values of each dimension that occur in a sensible combination.
    """

    raw: int = 0
    sensible: int = 0
    distinct: int = 0
    left_out: Counter[LeftOut] = field(default_factory=Counter)
    alive: dict[str, set[str]] = field(default_factory=dict)


def count(space: Space, compose: Compose, machine: Machine, allow_lossy: bool) -> Count:
    """Count `space` without walking through it.

    Raises:
        NotFactorableError: it cannot be counted this way.
    """
    total = Count(alive={key: set() for key in space.dimensions})
    boxes: set[Box] = set()
    for base in bases(space, compose, machine):
        total.raw += base.size
        if base.cfg is None:
            total.left_out[LeftOut("invalid", base.reason)] += base.size
        else:
            _BaseCount(base, base.cfg, machine, allow_lossy, total, boxes).run()
    total.distinct = _union_size(boxes)
    return total


@dataclass(frozen=True)
class _Entry:
    """What the values of one face of a knob come to, under the faces of the others."""

    total: int
    sensible: int
    left_out: Counter[LeftOut]
    canonical: frozenset[str]
    values: tuple[Value, ...]


@dataclass
class _BaseCount:
    """The count of one base; adds to `total` and `boxes`."""

    base: Base
    cfg: Config
    machine: Machine
    allow_lossy: bool
    total: Count
    boxes: set[Box]
    _entries: dict[tuple[str, tuple[Face, ...]], _Entry] = field(default_factory=dict)
    _alive: dict[tuple[str, tuple[Face, ...]], _Entry] = field(default_factory=dict)

    def run(self) -> None:
        """Count."""
        self._count_what_no_schema_admits()
        if not all(self._valid.values()):
            return
        names = list(BY_NAME)
        faces = [list(self._faces[name]) for name in names]
        if math.prod(map(len, faces)) > MAX_FACES:
            raise NotFactorableError("the knobs depend on one another in too many ways")
        context = frozenset([repr(self.cfg.context())])
        for chosen in itertools.product(*faces):
            self._add(context, dict(zip(names, chosen, strict=True)))
        for key, value in self.base.params.items() if self._alive else ():
            self.total.alive[key].add(value)
        for (name, _), entry in self._alive.items():
            self._mark(name, entry.values)

    def _add(self, context: frozenset[str], faces: Mapping[str, Face]) -> None:
        entries = {name: self._entry(name, faces) for name in faces}
        ordered = list(entries.values())
        before = 1
        for i, entry in enumerate(ordered):
            after = before * math.prod(later.total for later in ordered[i + 1 :])
            for reason, number in entry.left_out.items():
                self.total.left_out[reason] += number * after
            before *= entry.sensible
            if before == 0:
                return
        self.total.sensible += before
        self.boxes.add((context, *(entry.canonical for entry in ordered)))
        self._alive.update({self._key(name, faces): entries[name] for name in entries})

    def _key(self, name: str, faces: Mapping[str, Face]) -> tuple[str, tuple[Face, ...]]:
        return name, (faces[name], *(faces[other] for other in self._read_by[name]))

    def _entry(self, name: str, faces: Mapping[str, Face]) -> _Entry:
        key = self._key(name, faces)
        if key not in self._entries:
            self._entries[key] = self._make_entry(name, faces)
        return self._entries[key]

    def _make_entry(self, name: str, faces: Mapping[str, Face]) -> _Entry:
        total = sensible = 0
        reasons: Counter[LeftOut] = Counter()
        canonical: set[str] = set()
        admitted: list[Value] = []
        for i in self._faces[name][faces[name]]:
            value = self._valid[name][i]
            number = len(value.points)
            total += number
            answer = self._answer(self._leaves[name][i], faces)
            if isinstance(answer, LeftOut):
                reasons[answer] += number
            else:
                sensible += number
                canonical.add(answer)
                admitted.append(value)
        return _Entry(total, sensible, reasons, frozenset(canonical), tuple(admitted))

    def _answer(self, leaves: Sequence[Leaf[Answer]], faces: Mapping[str, Face]) -> Answer:
        """The leaf whose conditions these faces meet; exactly one does."""
        for leaf in leaves:
            if all(self._face_of(faces, *read) == text for read, text in leaf.conditions):
                return leaf.answer
        raise AssertionError("a combination of faces that no leaf describes")

    def _face_of(self, faces: Mapping[str, Face], knob: str, path: Path) -> str:
        return faces[knob][self._paths[knob].index(path)]

    @cached_property
    def _valid(self) -> dict[str, list[Value]]:
        return {
            name: [value for value in values if value.options is not None]
            for name, values in self.base.values.items()
        }

    @cached_property
    def _leaves(self) -> dict[str, list[list[Leaf[Answer]]]]:
        """For each knob and each of its values, the answers under all that others can be."""
        options = {name: [_options(value) for value in self._valid[name]] for name in self._valid}
        return {
            knob.name: [
                explore(self._judge(knob.name), self.cfg, knob.name, own, options)
                for own in options[knob.name]
            ]
            for knob in KNOBS
        }

    def _judge(self, name: str):  # type: ignore[no-untyped-def]
        knob = BY_NAME[name]

        def judge(cfg: Config) -> Answer:
            reason = knob_leaves_out(knob, cfg, self.machine, self.allow_lossy)
            return repr(knob.canonical(cfg)) if reason is None else reason

        return judge

    @cached_property
    def _paths(self) -> dict[str, list[Path]]:
        """The fields of each knob that others read."""
        found: dict[str, set[Path]] = {name: set() for name in BY_NAME}
        for leaf in _flat(self._leaves.values()):
            for (knob, path), _ in leaf.conditions:
                found[knob].add(path)
        return {name: sorted(paths) for name, paths in found.items()}

    @cached_property
    def _read_by(self) -> dict[str, list[str]]:
        """The other knobs that each knob reads."""
        found = {
            name: {read[0] for leaf in _flat([leaves]) for read, _ in leaf.conditions}
            for name, leaves in self._leaves.items()
        }
        return {name: sorted(others) for name, others in found.items()}

    @cached_property
    def _faces(self) -> dict[str, dict[Face, list[int]]]:
        """The values of each knob, as indices, by what others see of them."""
        found: dict[str, dict[Face, list[int]]] = {}
        for name, values in self._valid.items():
            faces: dict[Face, list[int]] = {}
            for i, value in enumerate(values):
                options = _options(value)
                face = tuple(text_of(options, path) for path in self._paths[name])
                faces.setdefault(face, []).append(i)
            found[name] = faces
        return found

    def _count_what_no_schema_admits(self) -> None:
        """Combinations with a value that a schema refuses, under the first knob's reason."""
        values = list(self.base.values.values())
        sizes = [sum(len(value.points) for value in part) for part in values]
        before = 1
        for i, part in enumerate(values):
            after = math.prod(sizes[i + 1 :])
            for value in part:
                if value.options is None:
                    reason = LeftOut("invalid", value.reason)
                    self.total.left_out[reason] += before * len(value.points) * after
            before *= sum(len(value.points) for value in part if value.options is not None)

    def _mark(self, name: str, values: Iterable[Value]) -> None:
        keys = self.base.keys[name]
        for value in values:
            for point in value.points:
                for key, text in zip(keys, point, strict=True):
                    self.total.alive[key].add(text)


def _options(value: Value) -> Options:
    assert value.options is not None
    return value.options


def _flat(leaves: Iterable[Sequence[Sequence[Leaf[Answer]]]]) -> Iterable[Leaf[Answer]]:
    for values in leaves:
        for value in values:
            yield from value


def _union_size(boxes: Iterable[Box]) -> int:
    """How many different combinations the boxes hold together.

    Members of a side that always occur together are one atom, so that a side that is the same in
    all boxes is counted once and not written out.
    """
    listed = list(boxes)
    if not listed:
        return 0
    sides = [_atoms({box[i] for box in listed}) for i in range(len(listed[0]))]
    union: set[tuple[int, ...]] = set()
    for box in listed:
        atoms = [sides[i][1][side] for i, side in enumerate(box)]
        if len(union) + math.prod(map(len, atoms)) > MAX_UNION:
            raise NotFactorableError("too many configurations have several origins")
        union.update(itertools.product(*atoms))
    weights = [weight for weight, _ in sides]
    return sum(math.prod(weights[i][atom] for i, atom in enumerate(atoms)) for atoms in union)


def _atoms(
    sets: Iterable[frozenset[str]],
) -> tuple[list[int], dict[frozenset[str], tuple[int, ...]]]:
    """The size of each atom of a family of sets, and each set as atoms."""
    family = sorted(sets, key=sorted)
    members: dict[tuple[bool, ...], int] = {}
    for member in frozenset().union(*family):
        where = tuple(member in one for one in family)
        members[where] = members.get(where, 0) + 1
    patterns = list(members)
    found = {
        one: tuple(i for i, where in enumerate(patterns) if where[position])
        for position, one in enumerate(family)
    }
    return [members[where] for where in patterns], found
