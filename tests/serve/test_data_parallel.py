"""An engine on a mesh gives every request what it gets on one device."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tests.serve import engine_harness
from tests.serve.engine_harness import BLOCK, Request, check_settled, drive, tokens_of
from v4jax import config
from v4jax.core.errors import UserError
from v4jax.serve import data_parallel
from v4jax.serve.engine import Engine
from v4jax.serve.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

DEVICES = 2
LIMITS = dataclasses.replace(engine_harness.LIMITS, max_num_seqs=2, max_num_batched_tokens=16)  # few programs
CACHE = config.Cache(kv_cache_tokens=768)
RNG = np.random.default_rng(0)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=12, logprobs=2)


def on(layout="serve", count=DEVICES, **axes):
    return data_parallel.data_parallel_group(config.Mesh(layout, **axes), jax.devices()[:count])


@pytest.fixture(scope="module")
def meshed(model):
    return Engine(model, LIMITS, CACHE, on())


def prompt(length):
    return RNG.integers(3, 2048, length).tolist()


def test_every_request_gets_what_it_gets_alone(meshed, plain):
    asked = [
        Request(prompt(n), sampling)
        for n, sampling in [
            (5, GREEDY),
            (300, SAMPLED),
            (70, GREEDY),
            (15, SAMPLED),
            (64, GREEDY),
            (40, SAMPLED),
            (1, GREEDY),
        ]
    ]
    for late, request in enumerate(asked):
        request.join = 2 * late
    homes = []
    place = lambda engine: [sum(map(bool, s.requests)) for s in engine.schedulers]
    step = meshed.step
    meshed.step = lambda: homes.append(place(meshed)) or step()
    answers = drive(meshed, asked)
    del meshed.step
    for request, answer in zip(asked, answers, strict=True):
        [alone] = drive(plain, [dataclasses.replace(request, join=0)])
        assert answer.tokens == alone.tokens
        for (a, tops), (b, others) in zip(answer.logprobs, alone.logprobs, strict=True):
            np.testing.assert_allclose([a, *tops], [b, *others], atol=1e-4)
    assert any(all(counts) for counts in homes)  # both devices had something to do at once


class EvenIds:
    """A token mask of even ids."""

    def restrict(self, generated, mask_W):
        mask_W &= np.int32(0x55555555)


def test_penalties_masks_and_prompt_logprobs_are_those_of_one_device(meshed, plain):
    penalized = dataclasses.replace(SAMPLED, logprobs=None, repetition_penalty=1.4, frequency_penalty=0.5)
    scored = dataclasses.replace(GREEDY, prompt_logprobs=2, min_tokens=3, stop_token_ids=[5])
    asked = [(prompt(20), penalized, ()), (prompt(70), scored, ()), (prompt(9), GREEDY, (EvenIds(),))]
    asked += [(prompt(33), penalized, (EvenIds(),)), (prompt(5), GREEDY, ())]

    def run(engine, requests):
        tokens, scores = [[] for _ in requests], [None] * len(requests)
        for id, (ids, sampling, masks) in enumerate(requests):
            engine.add_request(id, ids, sampling, masks=masks)
        while engine.busy:
            for drawn in engine.step():
                tokens[drawn.id] += drawn.sampled.token_B[drawn.row, : drawn.count].tolist()
                scores[drawn.id] = drawn.prompt_logprobs or scores[drawn.id]
        check_settled(engine)
        return tokens, scores

    tokens, scores = run(meshed, asked)
    for i, one in enumerate(asked):
        [alone], [scored_alone] = run(plain, [one])
        assert tokens[i] == alone
        assert (scores[i] is None) == (i != 1)
        if i == 1:
            for a, b in zip(scores[i], scored_alone, strict=True):
                np.testing.assert_allclose(a[:69], b[:69], atol=1e-4)
    assert all(token % 2 == 0 for token in tokens[2] + tokens[3]) and any(token % 2 for token in tokens[4])


def test_what_a_device_knows_is_asked_of_that_device(meshed):
    known = prompt(300)
    others = [Request(prompt(200), GREEDY) for _ in range(3)]
    first = drive(meshed, [Request(known, GREEDY), *others])[0]
    before = meshed.stats()["prefix_cache_hits"]
    again, *_ = drive(meshed, [Request(known, GREEDY), Request(prompt(20), GREEDY)])
    assert again == first and meshed.stats()["prefix_cache_hits"] == before + 256


def test_experts_are_split_and_the_cache_is_each_device_s_own(meshed):
    runner = meshed.model_runner
    split = {leaf.sharding.spec for leaf in runner.weights if leaf.sharding.shard_shape(leaf.shape) != leaf.shape}
    assert {(spec[0], len(spec)) for spec in split} == {("expert", 4), ("expert", 3)}  # EUDF and EFD
    for leaf in jax.tree.leaves((runner.caches, runner.decode_state, runner.block_tables)):
        assert not leaf.size or leaf.sharding.shard_shape(leaf.shape)[0] * DEVICES == leaf.shape[0]
    one = Engine(runner.model, LIMITS, CACHE, on())
    assert all(a is b for a, b in zip(one.model_runner.weights, runner.weights, strict=True))  # no second copy
    assert one.stats()["kv_device_used_bytes"] == meshed.stats()["kv_device_used_bytes"]


def test_pages_run_out_and_requests_leave(model, plain):
    """Each device has pages for one long request and a short one: the younger one is preempted."""
    engine = Engine(model, LIMITS, CACHE, on())
    asked = [Request(prompt(n), dataclasses.replace(GREEDY, max_tokens=40)) for n in (250, 255, 240, 252, 100, 250)]
    asked[4].join, asked[4].leave = 3, 6
    answers = drive(engine, asked)
    assert engine.stats()["num_preemptions"]
    for request, answer in list(zip(asked, answers, strict=True))[:4]:
        assert answer.tokens == tokens_of(plain, [request.prompt], request.sampling)[0]


def test_a_bad_request_ends_alone(model, meshed):
    """Token 7 is not finite wherever it is read, its neighbor on the other device is."""
    graphdef, variables = nnx.split(model)
    leaves, tree = jax.tree.flatten(variables)
    [embedding] = [i for i, leaf in enumerate(leaves) if leaf.shape == (2048, 32)][:1]
    leaves[embedding] = leaves[embedding].at[7].set(np.nan)
    broken = Engine(nnx.merge(graphdef, jax.tree.unflatten(tree, leaves)), LIMITS, CACHE, on())
    asked = [[5, 7, 9], [11, 12, 13], [14] * 5]
    ends, tokens = {}, {}
    for id, ids in enumerate(asked):
        broken.add_request(id, ids, GREEDY)
    while broken.busy:
        for drawn in broken.step():
            ends[drawn.id] = drawn.sampled.finite_B[drawn.row, : drawn.count].all()
            tokens.setdefault(drawn.id, []).extend(drawn.sampled.token_B[drawn.row, : drawn.count].tolist())
    check_settled(broken)
    assert ends == {0: False, 1: True, 2: True}
    assert [tokens[1], tokens[2]] == tokens_of(meshed, asked[1:], GREEDY)


def test_drafts_and_weights_in_8_bits(model):
    limits = dataclasses.replace(LIMITS, max_num_seqs=1, quantization="fp8")
    prompts = [prompt(n) for n in (9, 70, 20)]
    one = tokens_of(Engine(model, limits, CACHE), prompts, GREEDY)
    drafting = dataclasses.replace(limits, num_speculative_tokens=2)
    assert tokens_of(Engine(model, drafting, CACHE, on()), prompts, GREEDY) == one


def test_what_one_device_let_go_comes_back_on_any(meshed, model, plain, tmp_path):
    """Two rounds of conversations that the devices cannot hold, one more after a restart on one device."""
    prompts = [prompt(2 * BLOCK - 5) for _ in range(6)]
    expected = [tokens_of(plain, [each], GREEDY)[0] for each in prompts]
    below = {"kv_disk_bytes": 1 << 30, "kv_dir": str(tmp_path), "kv_load_timeout_s": 60.0}
    where = {"kv_host_bytes": 1 << 30} | below
    for places_of, cache, restored in ((on(), where, 0), (None, below, 1)):
        engine = Engine(model, LIMITS, dataclasses.replace(CACHE, **cache), places_of)
        for again in (0, 1):
            first = [leaf.unsafe_buffer_pointer() for leaf in pools(engine)]
            assert [tokens_of(engine, [each], GREEDY)[0] for each in prompts] == expected
            assert [leaf.unsafe_buffer_pointer() for leaf in pools(engine)] == first  # in place
            stats = engine.stats()
            assert (stats["restored_blocks"] > 0) == bool(again or restored)
        assert stats["transfer_dropped"] == stats["disk_corrupt"] == 0
        if places_of:
            assert all(connector.num_restored for connector in engine.kv_connector.device_connectors)
            assert "each of 2 devices" in engine.kv_connector.summary
            assert tokens_of(engine, prompts, GREEDY) == expected  # all at once
        engine.close(60.0)


def pools(engine):
    """Pages of each device."""
    return [
        shard.data
        for leaf in jax.tree.leaves(engine.model_runner.caches.layers[-1][-1].entries)
        for shard in leaf.addressable_shards
    ]


@pytest.mark.parametrize(
    "where, limits, cache, message",
    [
        (dict(layout="serve", count=4, tensor=2), {}, {}, "else over tensor"),
        (dict(layout="fsdp"), {}, {}, r"set mesh.rules \(--mesh\) to 'serve'"),
        (dict(count=3), {}, {}, "4 experts cannot be split over 3 devices"),
        ({}, {"batch_invariant": True}, {}, "batch_invariant needs an engine on one device"),
        ({}, {}, {"kv_device_entries": 64}, "kv_device_entries needs an engine on one device"),
    ],
)
def test_what_cannot_be_is_one_line(model, where, limits, cache, message):
    with pytest.raises(UserError, match=message):
        Engine(model, dataclasses.replace(LIMITS, **limits), config.Cache(**cache), on=on(**where))
