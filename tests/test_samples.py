import base64
import json
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from openpi_opt.samples import MAX_COUNT, Samples, pack


class Document(BaseModel):
    values: Samples


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(FINITE, max_size=50) | st.lists(st.floats(width=32, allow_nan=False), max_size=50))
def test_what_is_written_is_what_is_read(values):
    if not np.isfinite(values).all():
        with pytest.raises(ValueError, match="NaN or infinity"):
            unpack_text(values)
        return
    assert unpack_text(values) == values


def unpack_text(values: list[float]) -> list[float]:
    return Document.model_validate_json(Document(values=values).model_dump_json()).values


def test_the_recipe_in_the_documentation_reads_it():
    values = [16.04, 15.9, 16.125]
    document = json.loads(Document(values=values).model_dump_json())["values"]
    raw = zlib.decompress(base64.b64decode(document["data"]))
    assert np.frombuffer(raw, document["dtype"]).tolist() == values
    assert document["count"] == 3
    kinds = [pack(values)["dtype"] for values in ([0.5, 16.25], [0.1], [1e300])]
    assert kinds == ["<f4", "<f8", "<f8"], "float32 where nothing is lost"
    assert Document.model_validate_json('{"values": [1, 2.5]}').values == [1.0, 2.5]
    assert Document(values=[1.0]).model_dump() == {"values": [1.0]}


def damaged(**changes: Any) -> dict[str, Any]:
    return {**pack([1.0, 2.0, 3.0]), **changes}


BOMB = base64.b64encode(zlib.compress(bytes(50_000_000))).decode()


@pytest.mark.parametrize(
    "value",
    [
        damaged(data="!"),
        damaged(data="AAAA"),
        damaged(data=pack([1.0, 2.0, 3.0])["data"][:-8]),
        damaged(count=2),
        damaged(count=4),
        damaged(count=-1),
        damaged(count=MAX_COUNT + 1),
        damaged(data=BOMB),
        damaged(dtype="<f2"),
        damaged(dtype="O"),
        damaged(encoding="zip"),
        damaged(more=1),
        {"count": 3},
        "values",
        [1.0, "x"],
        None,
    ],
)
def test_damage_is_a_validation_error(value):
    with pytest.raises(ValidationError):
        Document.model_validate_json(json.dumps({"values": value}))


def test_a_small_text_cannot_fill_the_memory():
    document = json.dumps({"values": damaged(data=BOMB)})
    tracemalloc.start()
    try:
        with pytest.raises(ValidationError):
            Document.model_validate_json(document)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
