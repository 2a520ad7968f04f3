"""Logits that transformers gave once, for machines without torch. `python -m tests.golden logits` makes the files."""

import numpy as np
import pytest

from tests.golden import make_logits, weights
from v4jax.cache.allocate import contiguous_caches

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", weights.CASES)
def test_logits_are_those_of_transformers(name):
    """Full forward, then calls of 17 tokens into a state."""
    model, length = weights.CASES[name]
    with np.load(make_logits.path(name)) as file:
        ids, want = file["tokens"], file["logits"]
    assert ids.shape == (make_logits.ROWS, length) and want.std() > 0.5
    np.testing.assert_array_equal(ids, weights.tokens(model, ids.shape, seed=make_logits.SEED))
    net = weights.build(model, weights.random_flat(model, make_logits.SEED))
    np.testing.assert_allclose(weights.full(net, ids)[0], want, rtol=0, atol=1e-4 * want.std())
    state, parts = contiguous_caches(net, make_logits.ROWS, length), []
    for start in range(0, length, 17):
        count = min(17, length - start)
        call = np.pad(ids[:, start : start + count], ((0, 0), (0, 17 - count)))
        rows = lambda value: np.full(make_logits.ROWS, value, np.int32)
        logits, _, state = weights.step(net, call, rows(start), rows(count), state)
        parts.append(np.asarray(logits)[:, :count])
    np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=0, atol=1e-4 * want.std())


def test_files_are_small_and_weights_never_change():
    assert sum(make_logits.path(name).stat().st_size for name in weights.CASES) < 100_000
    flat = weights.random_flat(weights.CASES["usual"][0], make_logits.SEED)
    names = "embed.table", "layers.1.attn.q_up", "layers.2.ffn.experts.down"
    sample = [float(flat[name].ravel()[0]) for name in names]
    np.testing.assert_allclose(sample, [0.30926284193992615, -0.03968412056565285, 0.20829303562641144], rtol=1e-6)
