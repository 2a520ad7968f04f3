"""Documents packed into one row, each starting at a multiple of the ratios, are as if each were alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import weights
from v4jax.models.transformer import full_batch
from v4jax.nn.kv_cache_interface import NoCache

pytestmark = pytest.mark.slow

MODEL = weights.config(num_nextn_predict_layers=1)
LENGTHS = (21, 16, 3, 7)  # across windows of every kind, exactly one window, below the smallest one, between
ROW = 96


@jax.jit
def run(net, ids, positions, segments):
    chunk = full_batch(ids, positions, segments)
    x, _, aux = net.forward_hidden(chunk, net.no_cache())
    mtp, _, _, _ = net.mtp_forward(x, jnp.roll(ids, -1, 1), chunk, NoCache())
    return net.logits(x), mtp, aux


@functools.cache
def packed(filler):
    """Network, documents, their starts, and the packed row with `filler` as padding."""
    net = weights.build(MODEL, weights.random_flat(MODEL, 0))
    documents = [weights.tokens(MODEL, (n,), seed=n) for n in LENGTHS]
    ids, positions, segments = (np.zeros((1, ROW), np.int32) for _ in range(3))
    ids[:] = filler
    starts, start = [], 0
    for number, document in enumerate(documents, 1):
        place = slice(start, start + len(document))
        ids[0, place], positions[0, place], segments[0, place] = document, np.arange(len(document)), number
        starts.append(start)
        start += -(-len(document) // MODEL.alignment) * MODEL.alignment
    return net, documents, starts, run(net, ids, positions, segments)


@functools.cache
def alone(number):
    """The same document in a row of its own, padded to the same length (one compiled program serves all)."""
    net, documents, _, _ = packed(0)
    ids, positions, segments = (np.zeros((1, ROW), np.int32) for _ in range(3))
    n = len(documents[number])
    ids[0, :n], positions[0, :n], segments[0, :n] = documents[number], np.arange(n), 1
    return run(net, ids, positions, segments)


def test_logits_are_those_of_each_document_alone():
    net, documents, starts, (logits, mtp, _) = packed(0)
    spread = float(np.std(logits))
    for number, (document, start) in enumerate(zip(documents, starts, strict=True)):
        n = len(document)
        want, want_mtp, _ = alone(number)
        np.testing.assert_allclose(logits[0, start : start + n], want[0, :n], rtol=0, atol=2e-5 * spread)
        np.testing.assert_allclose(mtp[0, start : start + n - 1], want_mtp[0, : n - 1], rtol=0, atol=2e-5 * spread)


def test_a_document_alone_needs_no_padding():
    """Padding and segment numbers change nothing either: the plain forward gives the same."""
    net, documents, _, _ = packed(0)
    want, _, _ = weights.full(net, documents[0][None])
    n = len(documents[0])
    np.testing.assert_allclose(alone(0)[0][0, :n], want[0], rtol=0, atol=2e-5 * float(np.std(want)))


def test_losses_and_loads_add_up():
    """The indexer's loss is a mean over real tokens, loads are counts, and both leave padding out."""
    _, documents, _, (_, _, aux) = packed(0)
    parts = [alone(number)[2] for number in range(len(documents))]
    tokens = np.array([len(document) for document in documents])
    indexer = sum(n * part["indexer"] for n, part in zip(tokens, parts, strict=True)) / tokens.sum()
    np.testing.assert_allclose(aux["indexer"], indexer, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(aux["load_E"], sum(part["load_E"] for part in parts))
    np.testing.assert_array_equal(aux["load_E"].sum(-1), tokens.sum() * MODEL.moe.num_experts_per_tok)
    assert (aux["balance"][: MODEL.moe.num_hash_layers] == 0).all()
    assert (aux["balance"][MODEL.moe.num_hash_layers :] > 0).all()


def test_what_fills_the_gaps_does_not_matter():
    _, documents, starts, (want, _, aux) = packed(0)
    _, _, _, (got, _, other) = packed(5)
    for document, start in zip(documents, starts, strict=True):
        place = slice(start, start + len(document))
        np.testing.assert_allclose(got[0, place], want[0, place], rtol=0, atol=1e-5)
    for name in aux:
        np.testing.assert_allclose(other[name], aux[name], rtol=1e-4, atol=1e-6, err_msg=name)
