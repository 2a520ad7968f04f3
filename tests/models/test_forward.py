"""The forward against the specification in numpy float64, token by token."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.golden import weights
from tests.nn import reference
from v4jax.config import HyperConnection, Indexer, MoE, RoPE
from v4jax.core.errors import UserError
from v4jax.models.transformer import full_batch
from v4jax.nn.kv_cache_interface import NoCache

pytestmark = pytest.mark.slow

CONFIGS = {
    "usual": weights.config(),
    "no yarn, one group": weights.config(
        layer_types=("hca", "csa"),
        o_groups=1,
        rope=RoPE(),
        sliding_window=5,
        compress_rate_hca=12,
        mhc=HyperConnection(hc_mult=2, hc_sinkhorn_iters=3),
        moe=MoE(6, 3, 16, num_hash_layers=0, routed_scaling_factor=2.5, swiglu_limit=0.5),
    ),
    "whole head turns": weights.config(
        layer_types=("csa", "hca"),
        qk_rope_head_dim=16,
        compress_rate_csa=2,
        compress_rate_hca=6,
        sliding_window=3,
        indexer=Indexer(20, 16, 4),
        moe=MoE(4, 4, 8, num_hash_layers=1),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_the_specification(name):
    model = CONFIGS[name]
    flat, ids = weights.random_flat(model, 0), weights.tokens(model, (2, 43))
    logits, x, aux = weights.full(weights.build(model, flat), ids)
    want = [reference.forward(model, flat, row) for row in ids]
    spread = np.std([w[0] for w in want])
    np.testing.assert_allclose(logits, [w[0] for w in want], rtol=0, atol=2e-5 * spread)
    np.testing.assert_allclose(x, [w[2] for w in want], rtol=0, atol=2e-5 * np.std(x))
    np.testing.assert_allclose(aux["indexer"], np.mean([w[1] for w in want], axis=(0, 2)), rtol=2e-4, atol=1e-7)


@pytest.fixture(scope="module")
def one_layer():
    model = weights.config(layer_types=("swa",), num_nextn_predict_layers=1)
    return weights.build(model, weights.random_flat(model, 0))


@pytest.mark.parametrize(
    "tokens, words",
    [
        ([0, 5, 6], "the tokens have the shape [3]; give integers [B, T], for one row model([ids])"),
        (5, "have the shape []"),
        ([[[1, 2]]], "have the shape [1, 1, 2]"),
        ([[]], "the tokens are float64; give token ids"),
        (np.zeros((1, 0), int), "have the shape [1, 0]"),
        ("hello", "the tokens are text; give token ids, integers [B, T]"),
        (["hello"], "the tokens are text"),
        ([[1.0, 2.0]], "the tokens are float64"),
        ([[True]], "the tokens are bool"),
        ([[1, 2], [3]], "the tokens are no array; give integers [B, T], rows of one length"),
        (None, "the tokens are objects"),
        ([[1, -1]], "the tokens hold the id -1; the model's ids are 0 to"),
        ([[10**6, 2]], "the tokens hold the id 1000000"),
        ([[10**30]], "the tokens are objects"),
        (np.array([[2**32]]), "the tokens hold the id 4294967296"),
        (jax.numpy.array([[1, -5]]), "the tokens hold the id -5"),
        (jax.numpy.array([1, 5]), "have the shape [2]"),
        (jax.numpy.ones((1, 2)), "the tokens are float32"),
        (b"abc", "the tokens are |S3"),
        ({"a": 1}, "the tokens are objects"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_batch_of_tokens_is_one_line(one_layer, tokens, words):
    with pytest.raises(UserError) as error:
        one_layer(tokens)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_tokens_may_be_of_any_integer_type_and_traced(one_layer):
    ids = [[3, 5, 2]]
    want = np.asarray(one_layer(np.array(ids, np.int32)))
    assert want.shape == (1, 3, one_layer.config.vocab_size) and want.dtype == np.float32
    for tokens in (ids, np.array(ids, np.uint8), jax.numpy.array(ids)):
        np.testing.assert_array_equal(one_layer(tokens), want)
    np.testing.assert_allclose(jax.jit(lambda tokens: one_layer(tokens))(np.array(ids)), want, rtol=0, atol=1e-5)


def test_a_representation_is_one_short_line(one_layer):
    size = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(one_layer)))
    rest = f"float32, 1 layers: 1 swa, 1 MTP, vocabulary {one_layer.config.vocab_size:,}"
    assert repr(one_layer) == f"Transformer({size:,} parameters, {rest})"


def test_mtp_is_the_specification():
    model = weights.config(layer_types=("swa",), num_nextn_predict_layers=1)
    flat, ids = weights.random_flat(model, 2), weights.tokens(model, (2, 31))

    @jax.jit
    def run(net, ids):
        chunk = full_batch(ids[:, :-1])
        x = net.forward_hidden(chunk, net.no_cache())[0]
        return net.mtp_forward(x, ids[:, 1:], chunk, NoCache())[0]

    want = [reference.mtp(model, flat, reference.forward(model, flat, row[:-1])[2], row[1:]) for row in ids]
    np.testing.assert_allclose(run(weights.build(model, flat), ids), want, rtol=0, atol=2e-5 * np.std(want))


@pytest.mark.parametrize("length", [1, 3, 15])
def test_rows_shorter_than_a_window(length):
    """No entry is complete, or none of HCA: the row is attended raw."""
    model = weights.config(layer_types=("csa", "hca"))
    flat, ids = weights.random_flat(model, 0), weights.tokens(model, (1, length))
    want = reference.forward(model, flat, ids[0])[0]
    got = weights.full(weights.build(model, flat), ids)[0][0]
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.std(want))


def test_no_token_sees_a_later_one():
    model = CONFIGS["usual"]
    net, ids = weights.build(model, weights.random_flat(model, 0)), weights.tokens(model, (2, 43))
    before = np.asarray(weights.full(net, ids)[0])
    for place in (15, 31, 40):
        other = ids.copy()
        other[:, place:] = (other[:, place:] + 1) % model.vocab_size
        after = np.asarray(weights.full(net, other)[0])
        np.testing.assert_allclose(after[:, :place], before[:, :place], rtol=0, atol=1e-5)
        assert np.all(np.abs(after[:, place] - before[:, place]).max(-1) > 1e-3)
