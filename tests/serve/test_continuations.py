"""Several continuations of one prompt, log-probabilities of prompts, and bad words, through `LLM`."""

import asyncio

import jax
import numpy as np
import pytest

from tests.serve.engine_harness import BLOCK, check_settled
from v4jax.core.errors import UserError
from v4jax.serve import LLM, SamplingParams

IDS = np.random.default_rng(3).integers(3, 2000, 300).tolist()


@pytest.fixture(scope="module")
def llm(model, tokenizer):
    with LLM(model, tokenizer=tokenizer, max_num_seqs=4, max_model_len=576, max_num_batched_tokens=64) as llm:
        yield llm


def test_continuations_have_seeds_of_their_own_and_share_the_blocks_of_the_prompt(llm):
    before = llm.stats()["prefix_cache_hits"]
    [output] = llm.generate([IDS], SamplingParams(n=3, seed=8, max_tokens=6, ignore_eos=True, logprobs=1))
    assert llm.stats()["prefix_cache_hits"] - before == 2 * BLOCK
    assert [one.index for one in output.outputs] == [0, 1, 2] and output.finished
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    assert all(len(one.token_ids) == len(one.logprobs) == 6 for one in output.outputs)
    for i, one in enumerate(output.outputs):
        [alone] = llm.generate([IDS], SamplingParams(seed=8 + i, max_tokens=6, ignore_eos=True))
        assert alone.token_ids == one.token_ids
    check_settled(llm.engine)


def test_continuations_without_a_seed_differ_and_more_than_the_batch_holds_can_be_asked_for(llm):
    [output] = llm.generate([[5]], SamplingParams(n=9, max_tokens=5, ignore_eos=True))
    assert len(output.outputs) == 9 and len({tuple(one.token_ids) for one in output.outputs}) > 5


def test_continuations_are_streamed_together_and_ended_together(llm):
    params = SamplingParams(n=2, seed=1, max_tokens=5, ignore_eos=True)
    [whole] = llm.generate([[5]], params)

    async def stream(count=None):
        [request] = llm.make_requests([[5]], params)
        tokens, deltas = [[], []], []
        async for delta in llm.engine_loop.generate(request):
            deltas.append(delta)
            for one in delta.outputs:
                tokens[one.index] += one.token_ids
            if len(deltas) == count:
                break
        return tokens, deltas

    tokens, deltas = asyncio.run(stream())
    assert tokens == [one.token_ids for one in whole.outputs]
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    asyncio.run(stream(2))
    llm.stats()
    while llm.stats()["num_requests_running"]:
        pass
    check_settled(llm.engine)
    with pytest.raises(UserError, match="prompt 0 has n=2; LLM.stream yields one continuation"):
        llm.stream([[5]], params)


def test_prompt_logprobs_are_the_models_own_and_do_not_read_the_prefix_cache(llm, full_logits):
    short = IDS[:50]
    expected = np.asarray(jax.nn.log_softmax(full_logits(short), -1))
    for _ in range(2):
        [output] = llm.generate([short], SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=2))
        assert output.num_cached_tokens == 0
        assert len(output.prompt_logprobs) == 50 and output.prompt_logprobs[0] is None
        for i, (token, found) in enumerate(zip(short[1:], output.prompt_logprobs[1:], strict=True)):
            assert next(iter(found)) == token and len(found) in (2, 3)
            best = np.argsort(-expected[i])[:2]
            assert {*best.tolist(), token} == {*found}
            for id, (logprob, rank) in found.items():
                np.testing.assert_allclose(logprob, expected[i][id], atol=1e-4)
                assert rank == 1 + (expected[i] > expected[i][id]).sum()


@pytest.mark.slow
def test_prompt_logprobs_of_chunks_are_joined_and_others_are_as_before(llm):
    plain = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    [alone] = llm.generate([[5, 6, 7]], plain)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    outputs = llm.generate([IDS, [5, 6, 7], IDS[:1]], [params, plain, params])
    assert [len(found) for found in outputs[0].prompt_logprobs[1:]] == [1] * 299
    assert [next(iter(found)) for found in outputs[0].prompt_logprobs[1:]] == IDS[1:]
    assert outputs[2].prompt_logprobs == [None] and outputs[1].prompt_logprobs is None
    assert outputs[1].token_ids == alone.token_ids


def test_bad_words_are_not_written(llm, tokenizer):
    greedy = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    [free] = llm.generate("To be", greedy)
    word = tokenizer.decode(free.token_ids[3:5]).strip()
    [output] = llm.generate("To be", SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, bad_words=[word]))
    assert output.token_ids[:3] == free.token_ids[:3] and output.token_ids != free.token_ids
