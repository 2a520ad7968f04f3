"""From sampled tokens to outputs, without an engine: text, stop strings, finish reasons, deltas, counts."""

import numpy as np
import pytest

from v4jax.serve.engine import SampledTokens
from v4jax.serve.output_processor import OutputProcessor, split_at_stop
from v4jax.serve.sampler import SamplerOutput
from v4jax.serve.sampling_params import SamplingParams
from v4jax.serve.stop_tokens import Ends

EOS = 1


@pytest.fixture
def processor(tokenizer):
    return OutputProcessor(tokenizer, Ends(frozenset({EOS}), EOS))


def step(*tokens, finite=True, num_cached_tokens=0):
    """Tokens of one step in the second of two rows."""
    token_BT = np.array([[0] * len(tokens), tokens], np.int32)
    output = SamplerOutput(token_BT, np.full(token_BT.shape, finite))
    return SampledTokens("id", output, 1, len(tokens), num_cached_tokens)


def test_deltas_join_to_the_output(processor, tokenizer):
    ids = tokenizer.encode("To be, or not to be")
    request = processor.new_request("prompt", [7, 8], SamplingParams(max_tokens=len(ids)))
    assert request.delta() is None
    deltas = []
    for token in ids:
        request.update(step(token, num_cached_tokens=1))
        deltas.append(request.delta())
    assert request.delta().token_ids == []  # it has finished, and nothing is new
    assert "".join(delta.text for delta in deltas) == request.output().text == "To be, or not to be"
    assert [token for delta in deltas for token in delta.token_ids] == request.output().token_ids == ids
    assert [delta.finish_reason for delta in deltas] == [None] * (len(ids) - 1) + ["length"]
    assert [delta.num_cached_tokens for delta in deltas] == [1] * len(ids)
    assert (deltas[0].prompt, deltas[0].prompt_token_ids) == ("prompt", [7, 8])
    assert processor.stats() == {"prompt_tokens": 2, "generation_tokens": len(ids)}


def test_tokens_after_the_end_are_ignored_and_not_counted(processor):
    request = processor.new_request(None, [7], SamplingParams())
    request.update(step(30, EOS, 31))
    request.update(step(32))
    assert request.completions[0].token_ids == [30, EOS]
    assert (request.completions[0].finish_reason, request.completions[0].stop_reason) == ("stop", None)
    assert processor.stats() == {"prompt_tokens": 1, "generation_tokens": 2}


def test_ignore_eos_and_stop_token_ids_decide_what_ends(processor):
    request = processor.new_request(None, [7], SamplingParams(ignore_eos=True, stop_token_ids=[30]))
    request.update(step(EOS, 30))
    assert (
        request.completions[0].token_ids,
        request.completions[0].finish_reason,
        request.completions[0].stop_reason,
    ) == ([EOS, 30], "stop", 30)


def test_text_held_back_for_a_stop_string_is_in_the_last_delta(processor, tokenizer):
    ids = tokenizer.encode("abc")
    request = processor.new_request(None, [7], SamplingParams(max_tokens=16, stop="abcd"))
    request.update(step(*ids))
    assert (request.delta().text, request.delta()) == ("", None)
    request.abort()
    last = request.delta()
    assert (last.text, last.token_ids, last.finish_reason, last.finished) == ("abc", [], "abort", True)


def test_abort_does_not_change_what_has_finished(processor):
    request = processor.new_request(None, [7], SamplingParams(max_tokens=1))
    request.update(step(30))
    request.abort()
    assert request.completions[0].finish_reason == "length"


def test_logits_that_are_not_finite_finish_with_an_error(processor):
    request = processor.new_request(None, [7, 8], SamplingParams())
    request.update(step(30))
    request.update(step(0, finite=False))
    assert request.completions[0].finish_reason == "error"
    assert "token 3 are not finite" in request.output().error
    assert processor.stats() == {"prompt_tokens": 2, "generation_tokens": 1}


def test_stop_strings_that_end_within_min_tokens_do_not_count(processor, tokenizer):
    ids = [tokenizer.encode(letter)[0] for letter in "abab"]
    for min_tokens, text in [(0, ""), (1, ""), (2, "ab"), (3, "ab"), (4, "abab")]:
        request = processor.new_request(None, [7], SamplingParams(max_tokens=4, stop="ab", min_tokens=min_tokens))
        for token in ids:
            request.update(step(token))
        output = request.output()
        assert (output.text, output.finish_reason) == (text, "length" if min_tokens == 4 else "stop")


def test_deltas_of_several_continuations_hold_what_is_new(processor):
    request = processor.new_request(None, [7, 8], SamplingParams(n=3, max_tokens=2))
    request.update(step(30), 1)
    delta = request.delta()
    assert ([one.index for one in delta.outputs], delta.finished, delta.num_unfinished) == ([1], False, 2)
    request.update(step(31), 1)
    request.update(step(EOS), 0)
    delta = request.delta()
    assert [(one.index, one.finish_reason) for one in delta.outputs] == [(0, "stop"), (1, "length")]
    assert not delta.finished and request.delta() is None
    request.abort()
    delta = request.delta()
    assert [(one.index, one.finish_reason) for one in delta.outputs] == [(2, "abort")] and delta.finished
    assert [one.token_ids for one in request.output().outputs] == [[EOS], [30, 31], []]
    assert processor.stats() == {"prompt_tokens": 2, "generation_tokens": 3}


def test_without_a_tokenizer_texts_are_empty():
    request = OutputProcessor(None, Ends(frozenset(), None)).new_request(None, [7], SamplingParams(max_tokens=2))
    request.update(step(5, 6))
    assert (request.output().text, request.output().token_ids, request.completions[0].finish_reason) == (
        "",
        [5, 6],
        "length",
    )


@pytest.mark.parametrize(
    "text, stops, result",
    [
        ("hello", [], ("hello", False, "")),
        ("hello", ["lo"], ("hel", True, "")),
        ("hel", ["lo"], ("he", False, "l")),
        ("hello", ["ell", "hello"], ("h", True, "")),  # complete first
        ("hello", ["lo", "ello"], ("h", True, "")),  # complete together: the longest
        ("aab", ["aac"], ("aab", False, "")),
        ("xaa", ["aac", "ab"], ("x", False, "aa")),
        ("aaa", ["aab"], ("a", False, "aa")),
        ("", ["a"], ("", False, "")),
        ("abab", ["abac"], ("ab", False, "ab")),
    ],
)
def test_split_at_stop(text, stops, result):
    assert split_at_stop(text, stops) == result


def test_cuts_between_tokens_do_not_matter_to_stop_strings():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("ab"), 12))
        stops = ["".join(rng.choice(list("ab"), rng.integers(2, 6))) for _ in range(3)]
        results = set()
        for _ in range(4):
            shown, held, stopped, at = "", "", False, 0
            while at < len(text) and not stopped:
                size = rng.integers(1, 5)
                new, stopped, held = split_at_stop(held + text[at : at + size], stops)
                shown, at = shown + new, at + size
            results.add(shown + held)
        assert len(results) == 1
