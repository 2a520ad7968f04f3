"""Compressor: pooling per channel, overlap, missing first half, position of an entry, against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.golden import weights
from tests.nn import reference
from v4jax.models.transformer import full_batch
from v4jax.nn.compressor import Compressor
from v4jax.nn.kv_cache_interface import NoCache
from v4jax.nn.rope import frequencies


def _compressor(kind, size, **changes):
    model = weights.config(hidden_size=12, **changes)
    module = Compressor(model, kind, "H", size, nnx.Rngs(0))
    rng = np.random.RandomState(0)
    shapes = {"kv": module.kv.shape, "gate": module.gate.shape, "ape": module.ape.shape}
    w = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    for name, array in w.items():
        setattr(module, name, nnx.Param(jnp.asarray(array, jnp.float32)))
    w["norm.scale"] = 1 + 0.1 * rng.standard_normal(size)
    module.norm.scale = nnx.Param(jnp.asarray(w["norm.scale"], jnp.float32))
    return model, module, w


@jax.jit
def _run(module, x):
    return module(x, full_batch(jnp.zeros(x.shape[:2], jnp.int32)), NoCache(), "main")[:2]


@pytest.mark.parametrize(
    "kind, ratio, size", [("csa", 4, 16), ("csa", 4, 8), ("csa", 2, 16), ("hca", 16, 16), ("hca", 8, 16)]
)
def test_entries_are_the_specification(kind, ratio, size, length=37):
    model, module, w = _compressor(kind, size, **{f"compress_rate_{kind}": ratio})
    x = np.random.RandomState(1).standard_normal((2, length, 12)).astype(np.float32)
    got, windows = _run(module, x)
    freq = reference.frequencies(model.rope, model.qk_rope_head_dim, True)
    want = [reference.compress(w, row, ratio, kind == "csa", freq, model.rms_norm_eps) for row in x]
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)
    np.testing.assert_array_equal(windows.index_BC[0], np.arange(length // ratio))
    np.testing.assert_array_equal(windows.position_BC[0], np.arange(length // ratio) * ratio)


def test_an_entry_by_hand():
    """Ratio 2 with overlap, two channels, a norm of ones: which half of which token enters, with which bias."""
    model, module, _ = _compressor("csa", 2, compress_rate_csa=2, qk_rope_head_dim=2)
    put = lambda array: nnx.Param(jnp.asarray(array, jnp.float32))
    kv = np.zeros((12, 4))
    kv[0, :2], kv[1, 2:] = [1, 10], [1, 10]  # channel 0 of x feeds the "previous" half, channel 1 the "current" one
    gate = np.zeros((12, 4))
    module.kv, module.gate = put(kv), put(gate)
    bias = np.log([[1.0, 1, 3, 3], [2, 2, 4, 4]])  # softmax weights 1, 2 (previous tokens) and 3, 4 (current ones)
    module.ape, module.norm.scale = put(bias), put(np.ones(2))
    x = np.zeros((1, 4, 12), np.float32)
    x[0, :, 0], x[0, :, 1] = [1, 2, 100, 200], [5, 7, 11, 13]
    pooled = (1 * 1 + 2 * 2 + 3 * 11 + 4 * 13) / 10
    first = (3 * 5 + 4 * 7) / 7  # window 0: its previous half is missing and takes no weight
    pairs = [np.array([first, 10 * first]), np.array([pooled, 10 * pooled])]
    want = [pair / np.sqrt(np.mean(pair**2) + model.rms_norm_eps) for pair in pairs]
    freq = frequencies(model.rope, 2, compressed=True).astype(np.float64)
    want[1] = reference.rotate(want[1], 2, freq)  # entry 1 has the position of its first token
    np.testing.assert_allclose(_run(module, x)[0][0], want, atol=1e-5)


def test_an_entry_reads_its_window_and_the_one_before_alone():
    _, module, _ = _compressor("csa", 16, compress_rate_csa=4)
    x = np.random.RandomState(2).standard_normal((1, 16, 12)).astype(np.float32)
    before = _run(module, x)[0]
    for token in range(16):
        other = x.copy()
        other[0, token] += 1
        moved = np.abs(_run(module, other)[0] - before).max(-1)[0] > 1e-6
        window = token // 4
        assert moved.tolist() == [i in (window, window + 1) for i in range(4)]


def test_no_window_no_entry():
    _, module, _ = _compressor("csa", 16, compress_rate_csa=4)
    assert _run(module, np.ones((2, 3, 12), np.float32))[0].shape == (2, 0, 16)


def test_pooling_is_float32_whatever_the_input():
    _, module, _ = _compressor("hca", 16, compress_rate_hca=8)
    x = jnp.asarray(np.random.RandomState(3).standard_normal((1, 16, 12)), jnp.bfloat16)
    entries, windows = _run(module, x)
    wide, _ = _run(module, x.astype(jnp.float32))
    assert entries.dtype == jnp.bfloat16 and windows.now_BCPW.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(entries, np.float32), wide, atol=0.03)
