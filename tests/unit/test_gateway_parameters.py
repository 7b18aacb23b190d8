import math

import pytest

from engine.errors import InvalidRequestError
from gateway.parameters import ParameterError, checked_sampling, sampling_of_answer
from protos.isthmus.v1.sampling_pb2 import SamplingParams


def check(num_prompt_tokens=10, **fields):
    return checked_sampling(
        SamplingParams(**fields),
        num_prompt_tokens=num_prompt_tokens,
        max_context_tokens=100,
        num_vocabulary_tokens=256,
    )


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 99}, "n must be"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"num_top_logprobs": 21}, "num_top_logprobs"),
        ({"logit_bias": {300: 1.0}}, "logit_bias holds token id 300"),
        ({"logit_bias": {1: 101.0}}, "logit_bias"),
        ({"stop_token_ids": [256]}, "stop_token_ids holds token id 256"),
        ({"stop": ["x"] * 1000}, "stop takes at most 16 strings, got 1000"),
        ({"stop": [""]}, "stop string"),
        ({"stop": ["x" * 257]}, "stop string"),
    ],
)
def test_each_bad_value_is_named(fields, word):
    with pytest.raises(InvalidRequestError, match=word):
        check(**fields)


@pytest.mark.parametrize(("num_prompt_tokens", "max_tokens"), [(100, None), (101, 1), (90, 11)])
def test_what_does_not_fit_the_context_is_said_in_numbers(num_prompt_tokens, max_tokens):
    fields = {} if max_tokens is None else {"max_tokens": max_tokens}
    with pytest.raises(ParameterError, match="maximum context length is 100 tokens") as caught:
        check(num_prompt_tokens, **fields)
    assert caught.value.code == "context_length_exceeded"
    assert str(num_prompt_tokens) in str(caught.value)


def test_defaults_are_what_the_context_leaves_and_a_drawn_seed():
    first, second = check(), check()
    assert first.worker.max_tokens == 90
    assert first.num_answers == 1
    assert first.worker.seed != second.worker.seed


def test_the_workers_do_not_hear_of_stop_strings_and_n():
    checked = check(stop=["a"], n=3, seed=4)
    assert (checked.stops, checked.num_answers) == (("a",), 3)
    assert (list(checked.worker.stop), checked.worker.n) == ([], 0)


def test_answer_0_keeps_the_seed_and_the_others_have_their_own():
    worker = check(seed=4).worker
    seeds = [sampling_of_answer(worker, index).seed for index in range(4)]
    assert seeds[0] == 4
    assert len(set(seeds)) == 4
    assert seeds == [sampling_of_answer(worker, index).seed for index in range(4)]
