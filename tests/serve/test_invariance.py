"""`batch_invariant`: not only tokens but the bits of log-probabilities do not depend on what else runs.

The programs are compiled as users have them, for bits depend on that.
"""

import dataclasses

import pytest
from hypothesis import given

from tests.compiler import AS_USERS
from tests.serve.engine_harness import BLOCK, LIMITS, Request, compiled, drive, reset_cache
from tests.serve.request_mixes import BASES, SAMPLED, Solo, cache_sizes, check, crowded, few, request_mix, staying
from v4jax.serve.engine import Engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def as_users_have_them():
    """The tests' quick compiler (tests/conftest.py) set back to XLA's default."""
    with compiled(AS_USERS):
        yield


@pytest.fixture(scope="module")
def invariant(model, as_users_have_them):
    return Engine(model, dataclasses.replace(LIMITS, max_num_seqs=2, batch_invariant=True))


@pytest.fixture(scope="module")
def solo_bits(invariant):
    return Solo(invariant)


@few(max_examples=20)
@given(asked=request_mix(logprobs=(None, 0, 2, 4)), cache_sizes=cache_sizes)
def test_invariant_log_probabilities_are_equal_to_the_bit(invariant, solo_bits, asked, cache_sizes):
    reset_cache(invariant, **cache_sizes)
    answers = drive(invariant, asked)
    again = drive(invariant, staying(asked[:2]))
    check(asked, answers, solo_bits)
    check(staying(asked[:2]), again, solo_bits)


@pytest.mark.parametrize("phase", [0, 3])
def test_preemption_and_replay_keep_every_bit(invariant, solo_bits, phase):
    reset_cache(invariant, pages=2)
    asked = crowded(phase, sampling=dataclasses.replace(SAMPLED, logprobs=2))
    answers = drive(invariant, asked)
    assert invariant.stats()["num_preemptions"] == 1
    check(asked, answers, solo_bits)


def test_invariant_engines_share_no_decoded_block(invariant, solo_bits):
    first = Request(BASES[0][:250], dataclasses.replace(SAMPLED, logprobs=2))
    [answer] = drive(invariant, [first])
    longer = Request([*first.prompt, *answer.tokens], first.sampling)
    alone = solo_bits(longer)
    hits = []
    reset_cache(invariant)
    drive(invariant, [first])
    for _ in range(2):  # the second time by the block that the first one read as a prompt
        assert drive(invariant, [longer]) == [alone]
        hits.append(invariant.stats()["prefix_cache_hits"])
    assert hits == [0, BLOCK]


def test_invariant_engines_read_prompts_in_blocks_of_one_size(model, invariant):
    chunked = Engine(model, dataclasses.replace(LIMITS, max_num_seqs=2, batch_invariant=True, max_num_batched_tokens=7))
    asked = [Request(BASES[0][:300], dataclasses.replace(SAMPLED, logprobs=2))]
    reset_cache(invariant)
    assert drive(chunked, asked) == drive(invariant, asked)
