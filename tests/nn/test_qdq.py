"""Storage rounding in the forward: the formats, straight-through gradients, and that a cache in them loses nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import weights
from v4jax import config
from v4jax.core import qtensor
from v4jax.kernels.indexer import api, xla_scaled_dot
from v4jax.nn import qdq
from v4jax.serve.engine import Engine
from v4jax.serve.sampling_params import SamplingParams

pytestmark = pytest.mark.slow

MODEL = weights.config(
    layer_types=("csa", "hca"),
    head_dim=72,
    qk_rope_head_dim=8,
    kv_qdq=True,
    dtype="bfloat16",
    indexer=weights.Indexer(index_n_heads=16, index_head_dim=32, index_topk=4),
)


def test_entries_round_all_but_the_rotary_end():
    x = jnp.asarray(np.random.RandomState(0).standard_normal((3, 72)), jnp.float32).at[:, 0].set(448.0)
    got = qdq.entries(x, 8)
    np.testing.assert_array_equal(got[:, 64:], x[:, 64:])
    np.testing.assert_array_equal(got[:, :64], x[:, :64].astype(jnp.float8_e4m3fn).astype(jnp.float32))  # scale 1
    assert (got != x).any()


def test_keys_are_turned_before_they_are_rounded_and_products_survive():
    rng = np.random.RandomState(0)
    q, k = (jnp.asarray(rng.standard_normal((200, 32)), jnp.float32) for _ in range(2))
    turned = [np.asarray(qdq.keys(a)) for a in (q, k)]
    assert len(np.unique(np.abs(turned[0][0]) / np.abs(turned[0][0])[np.abs(turned[0][0]) > 0].min())) <= 12
    exact, rough = np.sum(q * k, -1), np.sum(turned[0] * turned[1], -1)
    assert np.corrcoef(exact, rough)[0, 1] > 0.97
    outlier = jnp.zeros((1, 32)).at[0, 0].set(100.0).at[0, 1].set(1.0)
    assert np.abs(np.asarray(qdq.keys(outlier))).min() > 0  # spread over all channels, none lost under the scale


def hadamard(size: int) -> np.ndarray:
    """Return the orthonormal Hadamard matrix in Sylvester's order, float32 [size, size]."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(size))


@pytest.mark.parametrize("function", [qdq.keys, lambda x: qdq.entries(x, 0)])
def test_gradients_pass_straight_through(function):
    x = jnp.asarray(np.random.RandomState(1).standard_normal((2, 64)), jnp.float32)
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(function(x))) / 2)(x)
    back = function(x) if function is not qdq.keys else qdq.keys(x) @ hadamard(64)
    np.testing.assert_allclose(gradient, back, rtol=1e-5, atol=1e-5)


def logprobs(model, layout):
    """Of an answer to one prompt, read as one chunk: the engine then compiles two programs."""
    prompt = np.random.RandomState(0).randint(3, 64, 80).tolist()
    net = weights.build(model, weights.random_flat(model, 3))
    engine = Engine(net, config.Serve(1, 256, 80), config.Cache(kv_cache_dtype=layout, enable_prefix_caching=False))
    engine.add_request(0, prompt, SamplingParams(temperature=0.0, max_tokens=12, logprobs=1, ignore_eos=True))
    drawn = []
    while engine.busy:
        drawn += [d.sampled.logprob_B[d.row, 0] for d in engine.step()]
    return drawn


def test_a_cache_in_these_formats_gives_the_same_logprobs():
    """Rounded twice is rounded once: every bit survives the FP8 and FP4 cache, and not that of a plain model."""
    assert logprobs(MODEL, "fp8_fp4") == logprobs(MODEL, "auto")
    plain = dataclasses.replace(MODEL, kv_qdq=False)
    assert logprobs(plain, "fp8_fp4") != logprobs(plain, "auto")


def test_keys_can_be_multiplied_as_they_are_stored(monkeypatch):
    """The products of backends that take e4m3: such a model's queries lose nothing in them."""
    calls, plain = [], logprobs(MODEL, "fp8")

    def scaled_dot(x, rows):
        calls.append(rows.values.dtype)
        return qtensor.scaled_dot(x, rows)

    monkeypatch.setattr(api, "_PREFERRED_FP8", {"cpu": "xla_scaled_dot"})
    monkeypatch.setattr(xla_scaled_dot, "scaled_dot", scaled_dot)
    np.testing.assert_allclose(logprobs(MODEL, "fp8"), plain, atol=1e-5)
    assert set(calls) == {np.dtype(np.uint8)}
    calls.clear()
    logprobs(dataclasses.replace(MODEL, kv_qdq=False), "fp8")
    assert not calls  # its queries would be rounded
