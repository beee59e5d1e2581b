"""All samples of a run inside its JSON document: a list of floats here, packed text there.

In a document they are {"encoding": "zlib+base64", "dtype": "<f8", "count": 412, "data": "eJw..."},
float32 (`<f4`) where that loses nothing. Without this package, in Python:
`numpy.frombuffer(zlib.decompress(base64.b64decode(x["data"])), x["dtype"])`.
Documents of format 1 hold plain lists; those are read as well.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from array import array
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

MAX_COUNT = 10_000_000


class Packed(BaseModel):
    """Samples as they stand in a document."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoding: Literal["zlib+base64"] = "zlib+base64"
    dtype: Literal["<f4", "<f8"]
    count: int = Field(ge=0, le=MAX_COUNT)
    data: str


def pack(values: list[float]) -> dict[str, Any]:
    """Pack samples for a document, without loss."""
    wide = array("d", values)
    try:
        narrow = array("f", values)
        fits = narrow.tolist() == wide.tolist()
    except OverflowError:  # beyond float32
        fits = False
    chosen = narrow if fits else wide
    text = base64.b64encode(zlib.compress(chosen.tobytes(), level=9)).decode("ascii")
    return Packed(dtype="<f4" if fits else "<f8", count=len(values), data=text).model_dump()


def unpack(packed: Packed) -> list[float]:
    """Undo `pack`. Raises ValueError: text that is not base64 of zlib, or not of `count` finite
    values."""
    values = array("f" if packed.dtype == "<f4" else "d")
    size = packed.count * values.itemsize
    decoder = zlib.decompressobj()
    try:
        # Never more than announced: a damaged document must not fill the memory.
        raw = decoder.decompress(base64.b64decode(packed.data, validate=True), size + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"packed samples cannot be read: {error}") from None
    if len(raw) != size or not decoder.eof:
        raise ValueError(f"packed samples are not the {packed.count} values that they announce")
    values.frombytes(raw)
    found = values.tolist()
    if not all(map(math.isfinite, found)):
        raise ValueError("packed samples hold NaN or infinity")
    return found


def _read(value: Any) -> Any:
    return unpack(Packed.model_validate(value)) if isinstance(value, dict) else value


Samples = Annotated[list[float], BeforeValidator(_read), PlainSerializer(pack, when_used="json")]
"""A list of floats that is packed in JSON; plain lists are read too."""
