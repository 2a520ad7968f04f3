"""Decoder layers: the classes that a `LayerSpec` names, and the tokens that count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden import weights
from v4jax.core.layer_spec import LAYER_CHOICES, LayerSpec
from v4jax.models.transformer import continuation_batch, full_batch
from v4jax.nn.decoder_layer import ATTENTION, MLP, DecoderLayer
from v4jax.nn.kv_cache_interface import CacheSlots, NoCache
from v4jax.nn.router import HashRouter, TopKRouter

MODEL = weights.config()
TOKENS = weights.tokens(MODEL, (2, 32))
# Row 0: two documents with padding after each. Row 1: padding only.
SEGMENTS = np.array([[1] * 13 + [0] * 3 + [2] * 9 + [0] * 7, [0] * 32], np.int32)
VALID = SEGMENTS > 0


def test_decoder_layer_has_a_class_for_every_choice():
    assert set(ATTENTION) == set(LAYER_CHOICES["attention"])
    assert set(MLP) == set(LAYER_CHOICES["mlp"])


def test_decoder_layer_takes_attention_and_router_from_its_spec():
    for attention in ATTENTION:
        for mlp, router in (("moe", TopKRouter), ("hash_moe", HashRouter)):
            layer = nnx.eval_shape(lambda a=attention, m=mlp: DecoderLayer(MODEL, LayerSpec(a, m), nnx.Rngs(0)))
            assert type(layer.attn) is ATTENTION[attention]
            assert type(layer.ffn.router) is router


def test_forward_batch_valid_tokens_of_packed_rows():
    batch = full_batch(TOKENS, None, jnp.asarray(SEGMENTS))
    np.testing.assert_array_equal(batch.valid_BT, VALID)
    assert full_batch(TOKENS).valid_BT is None


def test_forward_batch_valid_tokens_of_rows_in_use():
    slots = CacheSlots(jnp.array([1, 0]), jnp.array([[4, -1], [-1, -1]]))
    start, count = jnp.array([7, 0]), jnp.array([5, 9])
    first, none = np.arange(32) < 5, np.zeros(32, bool)
    np.testing.assert_array_equal(continuation_batch(TOKENS, start, count).valid_BT, [first, np.arange(32) < 9])
    np.testing.assert_array_equal(continuation_batch(TOKENS, start, count, slots).valid_BT, [first, none])
    np.testing.assert_array_equal(continuation_batch(TOKENS, start, None, slots).valid_BT, [~none, none])


@jax.jit
def run(layer, x, tokens):
    out, _, aux = layer(x, full_batch(tokens, None, jnp.asarray(SEGMENTS)), NoCache())
    return out, aux


def streams(seed: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((2, 32, MODEL.mhc.hc_mult, MODEL.hidden_size)).astype(np.float32)


@pytest.mark.parametrize("mlp", MLP)
def test_padding_changes_no_statistic_and_no_output_of_documents(mlp):
    layer = DecoderLayer(MODEL, LayerSpec("csa", mlp), nnx.Rngs(0))
    x, tokens = streams(0), TOKENS
    other_x = np.where(VALID[..., None, None], x, 50 * streams(1))
    other_tokens = np.where(VALID, tokens, (tokens + 5) % MODEL.vocab_size)
    (want, want_aux), (got, got_aux) = run(layer, x, tokens), run(layer, other_x, other_tokens)
    np.testing.assert_array_equal(np.asarray(got)[VALID], np.asarray(want)[VALID])
    for name in want_aux:
        np.testing.assert_array_equal(got_aux[name], want_aux[name], err_msg=name)
    assert float(want_aux["load_E"].sum()) == VALID.sum() * MODEL.moe.num_experts_per_tok
    assert (float(want_aux["balance"]) > 0) == (mlp == "moe")


@pytest.mark.parametrize("mlp", MLP)
def test_padding_reaches_no_expert(mlp):
    """What a padding token gets depends on no weight of the routed experts; what a token gets does."""
    layer = DecoderLayer(MODEL, LayerSpec("swa", mlp), nnx.Rngs(0))
    graph, state = nnx.split(layer)

    @jax.jit
    def gradient(state, where):
        total = lambda state: jnp.sum(run(nnx.merge(graph, state), streams(0), TOKENS)[0] * where[..., None, None])
        return nnx.merge(graph, jax.grad(total, allow_int=True)(state)).ffn.experts.down[...]

    assert not np.asarray(gradient(state, (~VALID).astype(np.float32))).any()
    assert np.asarray(gradient(state, VALID.astype(np.float32))).any()
