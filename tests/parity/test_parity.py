"""v4jax against transformers on random weights: logits, greedy generation, chunks, single tokens, ragged batches."""

import functools

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch and transformers are the oracle of this file")
pytest.importorskip("transformers", minversion="5.23", reason="transformers with deepseek_v4 is the oracle")

from tests.golden import weights
from tests.parity import oracle
from v4jax.cache.allocate import contiguous_caches
from v4jax.config import HyperConnection, Indexer, MoE, RoPE

pytestmark = pytest.mark.slow

NEW, WIDTH = 64, 16  # generated tokens; tokens of a prefill call
PROMPTS = (37, 22)  # no multiple of any ratio; two calls with a row that waits in the second half of the last one
ATOL = 1e-4  # of the standard deviation of the logits

# Between them: every layer kind first and last, hash and bias routing, one and several output groups, YaRN on and off,
# clamps in reach, picks fewer than entries, at least 16 indexer heads (fewer give ties at zero, spec 11.4).
CONFIGS = {
    "every kind": weights.config(),
    "no yarn, one group, no hash": weights.config(
        layer_types=("csa", "hca"),
        o_groups=1,
        rope=RoPE(),
        moe=MoE(8, 3, 24, num_hash_layers=0, swiglu_limit=0.5),
    ),
    "all hashed, odd window": weights.config(
        layer_types=("csa", "swa", "csa"),
        num_attention_heads=6,
        o_groups=3,
        sliding_window=5,
        moe=MoE(6, 2, 16, num_hash_layers=3, routed_scaling_factor=2.5),
        indexer=Indexer(index_n_heads=32, index_head_dim=8, index_topk=2),
    ),
    "other ratios and thetas": weights.config(
        layer_types=("csa", "hca"),
        sliding_window=13,
        compress_rate_csa=4,
        compress_rate_hca=10,
        qk_rope_head_dim=4,
        rope=RoPE(rope_theta=500.0, compress_rope_theta=3000.0, yarn_factor=4.0, yarn_original=32),
    ),
    "two streams, wide experts": weights.config(
        layer_types=("hca", "csa"),
        hidden_size=48,
        o_groups=4,
        mhc=HyperConnection(hc_mult=2, hc_sinkhorn_iters=4, hc_eps=1e-4),
        moe=MoE(4, 4, 40, num_hash_layers=1, swiglu_limit=10.0),
        rms_norm_eps=1e-3,
    ),
    "published thetas, whole head": weights.config(
        layer_types=("csa", "hca"),
        qk_rope_head_dim=16,
        sliding_window=16,
        indexer=Indexer(index_n_heads=16, index_head_dim=32, index_topk=5),
        rope=RoPE(yarn_factor=16.0, yarn_original=65_536),
        vocab_size=96,
    ),
}


@functools.cache
def case(name):
    model = CONFIGS[name]
    flat = weights.random_flat(model, 7)
    return model, weights.build(model, flat), oracle.network(model, flat)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_generation(name):
    """Ragged prefill in calls of 16, then 64 greedy tokens one by one, both rows in one batch; transformers generates
    each row alone, and its full forward over all tokens is what every call of ours is held against."""
    model, net, other = case(name)
    prompts = [weights.tokens(model, (n,), seed=n) for n in PROMPTS]
    rows = [np.concatenate([p, oracle.greedy(other, p, NEW)]).astype(np.int32) for p in prompts]
    want = [oracle.logits(other, row[None])[0] for row in rows]
    spread = np.std(np.concatenate(want))

    state, seen, got = contiguous_caches(net, 2, max(PROMPTS) + NEW), np.zeros(2, np.int32), [[], []]
    while (left := np.array(PROMPTS) - seen).any():
        counts, call = np.minimum(left, WIDTH).astype(np.int32), np.zeros((2, WIDTH), np.int32)
        for row, count in enumerate(counts):
            call[row, :count] = prompts[row][seen[row] : seen[row] + count]
        logits, _, state = weights.step(net, call, seen, counts, state)
        for row, count in enumerate(counts):
            got[row].extend(np.asarray(logits[row, :count]))
        seen = seen + counts
    made = [[int(np.argmax(row[-1]))] for row in got]
    for _ in range(NEW - 1):
        call = np.array([row[-1:] for row in made], np.int32)
        logits, _, state = weights.step(net, call, seen, np.ones(2, np.int32), state)
        for row in range(2):
            got[row].append(np.asarray(logits[row, 0]))
            made[row].append(int(np.argmax(logits[row, 0])))
        seen = seen + 1
    for row in range(2):
        assert made[row] == rows[row][len(prompts[row]) :].tolist()
        np.testing.assert_allclose(got[row], want[row][:-1], rtol=0, atol=ATOL * spread)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_forward(name):
    model, net, other = case(name)
    ids = weights.tokens(model, (2, 77))
    want = oracle.logits(other, ids)
    np.testing.assert_allclose(weights.full(net, ids)[0], want, rtol=0, atol=ATOL * np.std(want))


def test_public_call():
    """`model(tokens)` as users call it, compiled as usual."""
    model, net, other = case("other ratios and thetas")
    ids = weights.tokens(model, (1, 45))
    want = oracle.logits(other, ids)
    np.testing.assert_allclose(net(ids), want, rtol=0, atol=ATOL * np.std(want))
