"""Messages as openpi-client writes and reads them: msgpack, arrays as maps with bytes for keys.

Facts: Physical-Intelligence/openpi, packages/openpi-client, `msgpack_numpy.py`. What is read comes
from others: only plain numbers and texts become arrays, and sizes must agree.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np

_KINDS = "biufSU"


class WireError(ValueError):
    """A message that is no map of numbers, texts and arrays."""


def pack(message: Any) -> bytes:
    """A message of plain values, arrays and numpy scalars as bytes."""
    return bytes(msgpack.packb(message, default=_encoded))


def unpack(data: bytes | str) -> dict[Any, Any]:
    """The map in a message; arrays are views of `data`, which cannot be written to. Raises
    WireError: it is no such message."""
    if isinstance(data, str):
        raise WireError("a text instead of a binary message")
    try:
        message = msgpack.unpackb(data, object_hook=_decoded)
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"no msgpack message ({type(error).__name__}: {error})") from error
    if not isinstance(message, dict):
        raise WireError(f"a {type(message).__name__} instead of a map")
    return message


def _encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in _KINDS:
        raise WireError(f"arrays of {value.dtype} cannot be sent")
    if isinstance(value, np.ndarray):
        entry = {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str}
        return {**entry, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise WireError(f"a {type(value).__name__} cannot be sent")


def _decoded(entry: dict[Any, Any]) -> Any:
    if b"__ndarray__" in entry:
        return _array(entry)
    if b"__npgeneric__" in entry:
        try:
            return _dtype(entry).type(entry[b"data"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise WireError(f"no numpy scalar: {error}") from error
    return entry


def _array(entry: dict[Any, Any]) -> Any:
    try:
        shape = [int(size) for size in entry[b"shape"]]
        data, dtype = entry[b"data"], _dtype(entry)
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}")
        # Not np.ndarray(buffer=...), which takes a buffer that is larger.
        return np.frombuffer(data, dtype).reshape(shape)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise WireError(f"no array: {error}") from error


def _dtype(entry: dict[Any, Any]) -> np.dtype[Any]:
    dtype = np.dtype(entry[b"dtype"])
    if dtype.kind not in _KINDS or dtype.hasobject:
        raise WireError(f"arrays of {dtype} are not read")
    return dtype
