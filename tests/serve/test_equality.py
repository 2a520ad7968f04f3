"""What a request answers does not depend on what else runs: property-based, against its answer alone.

One engine a mode for the whole module, with an empty cache an example; its arrays keep what earlier examples wrote.
"""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.engine_harness import BLOCK, LIMITS, MODEL, Request, draw_model, drive, reset_cache
from tests.serve.request_mixes import (
    BASES,
    GREEDY,
    MOST,
    SAMPLED,
    Solo,
    cache_sizes,
    check,
    crowded,
    few,
    request_mix,
    staying,
)
from v4jax.serve import model_steps
from v4jax.serve.engine import Engine
from v4jax.serve.request import RequestStatus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def speculating(model):
    return Engine(
        model, dataclasses.replace(LIMITS, max_num_seqs=2, max_num_batched_tokens=16, num_speculative_tokens=2)
    )


@pytest.fixture(scope="module")
def solo(plain):
    return Solo(plain)


# --- joining, leaving, preemption, prefix hits ------------------------------------------------------------------------


@few(max_examples=25)
@given(asked=request_mix(), cache_sizes=cache_sizes, chunk=st.sampled_from([7, 64]))
def test_a_request_among_others_answers_as_alone(plain, solo, asked, cache_sizes, chunk):
    reset_cache(plain, **cache_sizes, chunk=chunk)
    answers = drive(plain, asked)
    again = drive(plain, staying(asked[:2]))  # what was kept is right, too
    check(asked, answers, solo)
    check(staying(asked[:2]), again, solo)


@pytest.mark.parametrize("phase", range(MODEL.compress_rate_hca))
def test_a_request_preempted_in_any_phase_of_compression_answers_as_alone(plain, solo, phase):
    reset_cache(plain, pages=2)
    answers = drive(plain, crowded(phase))
    assert plain.stats()["num_preemptions"] == 1
    check(crowded(phase), answers, solo)


@pytest.mark.parametrize("chunk", [3, 7])
def test_a_request_preempted_while_it_reads_its_prompt_answers_as_alone(plain, solo, chunk):
    reset_cache(plain, pages=2, chunk=chunk)
    asked, states = crowded(length=200), []
    leave = plain.schedulers[0]._retire
    plain.schedulers[0]._retire = lambda sequence, state: (
        states.append((sequence.status, state)) or leave(sequence, state)
    )
    answers = drive(plain, asked)
    assert states[0] == (RequestStatus.PREFILL, RequestStatus.PREEMPTED)
    check(asked, answers, solo)


def test_a_prefix_is_found_again_by_those_who_may(plain, solo):
    asked, hits = [Request(BASES[0][:513], SAMPLED), Request(BASES[0][:300], GREEDY)], []
    alone = [solo(request) for request in asked]
    reset_cache(plain)
    for salt in ("", "", "other", "other"):
        assert drive(plain, [dataclasses.replace(request, salt=salt) for request in asked]) == alone
        hits.append(plain.stats()["prefix_cache_hits"])
    assert hits == [0, 3 * BLOCK, 3 * BLOCK, 6 * BLOCK]  # two blocks and one; those of strangers are not found


def test_other_weights_find_nothing(plain, solo):
    other = Engine(draw_model(1), LIMITS)
    alone = Solo(other)
    asked = [Request(BASES[0][:300], GREEDY)]
    expected = alone(asked[0])
    reset_cache(plain)
    check(asked, drive(plain, asked), solo)
    other.schedulers[0] = plain.schedulers[0]  # the same scheduler, as if they were one cache
    check(asked, drive(other, asked), alone)
    assert other.stats()["prefix_cache_hits"] == 0 and expected != solo(asked[0])


# --- speculation ------------------------------------------------------------------------------------------------------


class Drafted:
    """Runs of the speculating engine with drafts that are right so often: of random weights, real ones never are."""

    def __init__(self, engine, solo):
        self.engine, self.solo, self.rng = engine, solo, np.random.default_rng(0)

    def __call__(self, asked, right=0.7):
        whole = [dataclasses.replace(a.sampling, max_tokens=MOST) for a in asked]
        known = [[*a.prompt, *self.solo(Request(a.prompt, s)).tokens] for a, s in zip(asked, whole, strict=True)]
        draft = model_steps.propose_draft

        def foretell(*args):
            mtp, heads = draft(*args)
            draft_ZK, position_Z = (np.array(a) for a in jax.device_get((heads.draft_ZK, heads.position_Z)))
            for sequence in self.engine.schedulers[0].requests.values():
                next = int(position_Z[sequence.state_slot]) + 1
                for k in range(draft_ZK.shape[1]):
                    truth = known[sequence.id][next + k : next + k + 1]
                    draft_ZK[sequence.state_slot, k] = truth[0] if truth and self.rng.random() < right else 3
            return mtp, heads._replace(draft_ZK=jax.device_put(draft_ZK))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_steps, "propose_draft", foretell)
            return drive(self.engine, asked)


@pytest.fixture(scope="module")
def drafted(speculating, solo):
    return Drafted(speculating, solo)


@few(max_examples=15)
@given(asked=request_mix(), cache_sizes=cache_sizes)
def test_speculation_changes_nothing(drafted, speculating, solo, asked, cache_sizes):
    reset_cache(speculating, **cache_sizes)
    answers = drafted(asked)
    again = drafted(staying(asked[:2]))
    check(asked, answers, solo)
    check(staying(asked[:2]), again, solo)


@pytest.mark.parametrize("right, least, most", [(1.0, 8, 12), (0.0, 24, 26)])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_right_drafts_save_steps(drafted, speculating, solo, monkeypatch, right, least, most, sampling):
    asked = [Request(BASES[0][:9], sampling)]
    alone = [solo(request) for request in asked]
    steps, decode = [], model_steps.decode
    monkeypatch.setattr(model_steps, "decode", lambda *args: steps.append(0) or decode(*args))
    reset_cache(speculating)
    assert drafted(asked, right) == alone
    assert least <= 1 + len(steps) <= most  # the first token comes with the prompt


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_of_the_layer_itself_change_nothing(speculating, solo, sampling):
    reset_cache(speculating)
    asked = [Request(BASES[0][:length], sampling) for length in (9, 250, 256)]
    check(asked, drive(speculating, asked), solo)


def test_speculating_engines_report_the_same_log_probabilities(drafted, speculating, solo):
    asked = [Request(BASES[0][:9], dataclasses.replace(SAMPLED, logprobs=2))]
    alone = [solo(request) for request in asked]
    reset_cache(speculating)
    answers = drafted(asked)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
    flat = lambda answers: np.array([[chosen, *top] for answer in answers for chosen, top in answer.logprobs])
    np.testing.assert_allclose(flat(answers), flat(alone), atol=1e-4)
