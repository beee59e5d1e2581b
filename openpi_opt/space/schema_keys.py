"""The values that a single key of the schema admits, for `glob(*)` over a key."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from openpi_opt.config import SECTIONS
from openpi_opt.knobs import BY_NAME


def key_values(key: str) -> list[Any]:
    """Every value of a switch or a choice such as `attention.denoise`; empty for other keys. The
    default comes first."""
    field = _field(key)
    if field is None:
        return []
    return sorted(_admitted(field.annotation), key=lambda value: value != field.default)


def is_free(key: str) -> bool:
    """Whether anything may be added below `key`: its values have names of the user's."""
    field = _field(key)
    return field is not None and get_origin(field.annotation) is dict


def paths(head: str) -> list[str]:
    """Every key below a section or knob, nested ones included: `compile.inductor.freezing`."""
    return list(_below(head, _fields(_schema(head))))


def _schema(head: str) -> Any:
    return BY_NAME[head].options_type if head in BY_NAME else SECTIONS.get(head)


def _fields(annotation: Any) -> dict[str, FieldInfo]:
    """The fields of a model; none of anything else."""
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation.model_fields if is_model else {}


def _field(key: str) -> FieldInfo | None:
    """The schema's field of a key; None for a section or knob itself and for unknown keys."""
    head, *path = key.split(".")
    annotation, field = _schema(head), None
    for name in path:
        field = _fields(annotation).get(name)
        annotation = field and field.annotation
    return field


def _admitted(annotation: Any) -> list[Any]:
    """The members of a Literal, of bool, of None, and of a union of these."""
    origin = get_origin(annotation)
    if origin is Literal:
        return list(get_args(annotation))
    if origin is Annotated:
        return _admitted(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        members = [_admitted(part) for part in get_args(annotation)]
        return [value for part in members for value in part] if all(members) else []
    if annotation is bool:
        return [False, True]
    return [None] if annotation is type(None) else []


def _below(prefix: str, fields: dict[str, FieldInfo]) -> Iterator[str]:
    for name, field in fields.items():
        yield f"{prefix}.{name}"
        yield from _below(f"{prefix}.{name}", _fields(field.annotation))
