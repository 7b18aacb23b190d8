from dataclasses import replace
from typing import Any

import pytest

from engine.errors import InvalidRequestError
from engine.kv_cache.layout import KvLayout
from kv_transfer import convert
from protos.isthmus.v1 import kv_transfer_pb2

LAYOUT = KvLayout(
    num_layers=30, num_kv_heads=3, head_dim=64, block_size_tokens=16, dtype="bfloat16"
)


def test_layouts_survive_the_wire() -> None:
    assert convert.layout_from(convert.layout_to_pb(LAYOUT)) == LAYOUT
    other = replace(LAYOUT, dtype="float32")
    assert convert.layout_from(convert.layout_to_pb(other)) != LAYOUT


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_layers", 0), ("head_dim", 2**32 - 1), ("dtype", "int8"), ("dtype", "")],
)
def test_a_layout_that_cannot_be_is_refused(field: str, value: Any) -> None:
    message = convert.layout_to_pb(LAYOUT)
    setattr(message, field, value)
    with pytest.raises(InvalidRequestError, match=field):
        convert.layout_from(message)


def test_an_empty_layout_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="num_layers"):
        convert.layout_from(kv_transfer_pb2.KvLayout())
