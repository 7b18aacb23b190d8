import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidRequestError
from engine.request import FinishReason, SamplingParams, TokenLogprobs
from mesh import convert
from protos.isthmus.v1 import sampling_pb2 as pb

TOKEN_ID = st.integers(0, 2**32 - 1)


def float32(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32, allow_nan=False)


@st.composite
def sampling(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 2**32 - 1))
    return SamplingParams(
        temperature=draw(float32(0, 100)),
        top_p=draw(float32(2**-10, 1)),
        top_k=draw(st.integers(0, 2**32 - 1)),
        min_p=draw(float32(0, 1)),
        presence_penalty=draw(float32(-2, 2)),
        frequency_penalty=draw(float32(-2, 2)),
        repetition_penalty=draw(float32(2**-10, 10)),
        logit_bias=tuple(
            sorted(draw(st.dictionaries(TOKEN_ID, float32(-100, 100), max_size=5)).items())
        ),
        seed=draw(st.integers(0, 2**64 - 1)),
        stop_token_ids=draw(st.frozensets(TOKEN_ID, max_size=5)),
        ignore_eos=draw(st.booleans()),
        min_tokens=draw(st.integers(0, max_tokens)),
        max_tokens=max_tokens,
        num_top_logprobs=draw(st.none() | st.integers(0, 20)),
    )


@given(sampling())
def test_sampling_survives_the_wire(params: SamplingParams) -> None:
    data = convert.sampling_to_pb(params).SerializeToString()
    assert convert.sampling_from_pb(pb.SamplingParams.FromString(data)) == params


def test_every_field_is_set_on_the_wire() -> None:
    message = convert.sampling_to_pb(SamplingParams(num_top_logprobs=0))
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        if field.has_presence:
            assert message.HasField(field.name), field.name


def test_absent_fields_take_the_defaults() -> None:
    params = convert.sampling_from_pb(pb.SamplingParams(), default_seed=7, default_max_tokens=9)
    assert params == SamplingParams(seed=7, max_tokens=9)


def test_what_is_set_wins_over_a_default() -> None:
    message = pb.SamplingParams(seed=0, max_tokens=1)
    params = convert.sampling_from_pb(message, default_seed=7, default_max_tokens=9)
    assert (params.seed, params.max_tokens) == (0, 1)


@pytest.mark.parametrize("missing", ["seed", "max_tokens"])
def test_inside_the_mesh_nothing_may_be_missing(missing: str) -> None:
    message = convert.sampling_to_pb(SamplingParams())
    message.ClearField(missing)
    with pytest.raises(InvalidRequestError, match=missing):
        convert.sampling_from_pb(message)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", 1e39),  # infinite in 32 bits
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -math.inf),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("max_tokens", 0),
        ("num_top_logprobs", 21),
        ("min_tokens", 17),
        ("stop_token_ids", [1] * 2000),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", dict.fromkeys(range(2000), 1.0)),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: Any) -> None:
    message = convert.sampling_to_pb(SamplingParams(max_tokens=16))
    message.ClearField(field)
    message.MergeFrom(pb.SamplingParams(**{field: value}))
    with pytest.raises(InvalidRequestError, match=field):
        convert.sampling_from_pb(message)


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_finish_reasons_survive_the_wire(reason: FinishReason | None) -> None:
    assert convert.finish_reason_from_pb(convert.finish_reason_to_pb(reason)) is reason


def test_every_finish_reason_of_the_wire_has_a_meaning() -> None:
    for value in pb.FinishReason.values()[1:]:
        assert convert.finish_reason_to_pb(convert.finish_reason_from_pb(value)) == value


def test_logprobs_survive_the_wire() -> None:
    logprobs = TokenLogprobs(-0.5, ((7, -0.5), (9, -math.inf)))
    assert convert.logprobs_from_pb(convert.logprobs_to_pb(logprobs)) == logprobs
