"""Options of a request: values that are read, and one line for all others."""

import dataclasses

import numpy as np
import pytest

from v4jax.core.errors import UserError
from v4jax.serve.sampling_params import SamplingParams


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"zzz": 1}, "options: max_tokens"),
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": -2}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be"),
        ({"min_p": 1.5}, "min_p must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**64}, "seed must be"),
        ({"stop": ["a", ""]}, "stop must be"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be"),
        ({"logprobs": 21}, "logprobs must be"),
        ({"max_tokens": True}, "max_tokens must be"),
        ({"temperature": 101}, "temperature must be a number from 0 to 100"),
        ({"temperature": 1e300}, "temperature must be"),
        ({"temperature": float("inf")}, "temperature must be"),
        ({"temperature": "1"}, "temperature must be"),
        ({"temperature": None}, "temperature must be"),
        ({"temperature": 10**400}, "temperature must be"),
        ({"top_p": float("nan")}, "top_p must be"),
        ({"top_p": -float("inf")}, "top_p must be"),
        ({"top_p": [1]}, "top_p"),
        ({"min_p": float("nan")}, "min_p must be"),
        ({"min_p": -0.1}, "min_p must be"),
        ({"top_k": 1.0}, "top_k must be"),
        ({"top_k": float("nan")}, "top_k must be"),
        ({"seed": 1.0}, "seed must be"),
        ({"seed": "1"}, "seed must be"),
        ({"stop": 5}, "stop must be"),
        ({"stop": b"a"}, "stop must be"),
        ({"stop": [b"a"]}, "stop must be"),
        ({"stop": ""}, "stop must be"),
        ({"stop": {"a": 1}}, "stop must be"),
        ({"stop": "\ud800"}, "stop must be"),
        ({"stop_token_ids": "12"}, "stop_token_ids must be"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids must be"),
        ({"stop_token_ids": [True]}, "stop_token_ids must be"),
        ({"stop_token_ids": np.eye(2)}, "stop_token_ids must be"),
        ({"stop_token_ids": 1.5}, "stop_token_ids must be"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False"),
        ({"ignore_eos": None}, "ignore_eos must be"),
        ({"logprobs": -1}, "logprobs must be"),
        ({"logprobs": float("nan")}, "logprobs must be"),
        ({"stop": ["x" * 999, 5]}, "stop must be"),
        ({"presence_penalty": 2.1}, "presence_penalty must be a number from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias must be a dict of token ids and numbers"),
        ({"logit_bias": {1: "x"}}, "logit_bias must be"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias must be"),
        ({"logit_bias": "ab"}, "logit_bias must be"),
        ({"logit_bias": 5}, "logit_bias must be"),
        ({"min_tokens": -1}, "min_tokens must be an integer from 0 to max_tokens (16)"),
        ({"min_tokens": 17}, "min_tokens must be"),
        ({"allowed_token_ids": []}, "allowed_token_ids must be at least one token id"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids must be token ids"),
        ({"bad_words": [""]}, "bad_words must be"),
        ({"n": 0}, "n must be from 1 to 16384"),
        ({"n": 2, "temperature": 0}, "n must be 1 when temperature is 0"),
        ({"priority": 1.5}, "priority must be an integer"),
        ({"prompt_logprobs": 21}, "prompt_logprobs must be"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs must be a StructuredOutputsParams"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(options, words):
    with pytest.raises(UserError) as error:
        SamplingParams(**options)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_number_that_python_does_not_write_out_is_one_line():
    with pytest.raises(UserError, match="temperature must be .*, got an integer of thousands of digits"):
        SamplingParams(temperature=10**5000)


def test_options_take_one_stop_or_several():
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[3]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=np.array([3, 4])).stop_token_ids == (3, 4)
    assert SamplingParams(stop_token_ids=7).stop_token_ids == (7,)
    assert SamplingParams().stop == SamplingParams().stop_token_ids == ()


def test_biases_are_clipped_and_sorted_and_options_can_be_replaced():
    params = SamplingParams(logit_bias={9: 1000, 2: -1000.0, 5: 0.5}, allowed_token_ids=range(3), bad_words="x")
    assert params.logit_bias == ((2, -100.0), (5, 0.5), (9, 100.0))
    assert (params.allowed_token_ids, params.bad_words) == ((0, 1, 2), ("x",))
    assert dataclasses.replace(params, seed=None) == params and hash(params) == hash(dataclasses.replace(params))
    assert SamplingParams(logit_bias={}).logit_bias == SamplingParams().logit_bias == ()
    assert not SamplingParams().penalized and SamplingParams(repetition_penalty=0.9).penalized
