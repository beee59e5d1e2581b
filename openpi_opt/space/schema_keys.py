"""The values that a single key of the schema admits, for `glob(*)` over a key."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from openpi_opt.config import SECTIONS
from openpi_opt.knobs import BY_NAME


def key_values(key: str) -> list[Any]:
    """Every value of a switch or a choice such as `attention.denoise`; empty for other keys.

    The default comes first.
    """
    head, *path = key.split(".")
    model: Any = BY_NAME[head].options_type if head in BY_NAME else SECTIONS.get(head)
    for name in path[:-1]:
        model = model.model_fields[name].annotation if _has(model, name) else None
    if not path or not _has(model, path[-1]):
        return []
    field = model.model_fields[path[-1]]
    values = _admitted(field.annotation)
    return sorted(values, key=lambda value: value != field.default)


def _has(model: Any, name: str) -> bool:
    return isinstance(model, type) and issubclass(model, BaseModel) and name in model.model_fields


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


def paths(head: str) -> list[str]:
    """Every key below a section or knob, nested ones included: `compile.inductor.freezing`."""
    model: Any = BY_NAME[head].options_type if head in BY_NAME else SECTIONS.get(head)
    return [] if model is None else list(_below(head, model))


def is_free(key: str) -> bool:
    """Whether anything may be added below `key`: its values have names of the user's."""
    head, *path = key.split(".")
    model: Any = BY_NAME[head].options_type if head in BY_NAME else SECTIONS.get(head)
    for name in path:
        model = model.model_fields[name].annotation if _has(model, name) else None
    return get_origin(model) is dict


def _below(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}.{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _below(f"{prefix}.{name}", field.annotation)
