"""Weights in 8 bits: which they are, their blocks, and that the model computes with exactly those numbers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import v4jax
from tests.serve import engine_harness
from v4jax.core.errors import UserError
from v4jax.core.qtensor import QTensor, quantize_blocks
from v4jax.models import quantize
from v4jax.serve import LLM, SamplingParams

pytestmark = pytest.mark.slow

STAY = {"table", "weight", "bias", "scale", "base", "fn", "sink", "ape", "gate"}  # "kv" is of two kinds


@pytest.fixture(scope="module")
def model():
    return engine_harness.draw_model(0)


@pytest.fixture(scope="module")
def narrow(model):
    return quantize.quantize_model(model)


def leaves(model):
    return {".".join(map(str, place)): variable[...] for place, variable in nnx.to_flat_state(nnx.state(model))}


def widened(model):
    """The model with its QTensors as the float32 arrays that they stand for."""
    graphdef, state = nnx.split(model)
    wide = lambda value: value.astype(jnp.float32) if isinstance(value, QTensor) else value
    flat = [(place, variable.replace(wide(variable[...]))) for place, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(dict(flat)))


@pytest.mark.parametrize(
    "shape, axes, blocks",
    [
        ((256, 384), (0, 1), (2, 3)),
        ((3, 130, 2, 96), (1, -1), (3, 2, 2, 1)),
    ],
)
def test_a_block_has_the_least_power_of_two_that_holds_it(shape, axes, blocks):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 3
    q = jax.jit(quantize_blocks, static_argnums=1)(x, axes)
    assert q.values.dtype == q.scales.dtype == jnp.uint8 and q.shape == shape
    expected = np.empty_like(x)
    sizes = [n // parts for n, parts in zip(shape, blocks, strict=True)]
    assert q.scales.shape == blocks
    for index in np.ndindex(*q.scales.shape):
        part = tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, sizes, strict=True))
        block = x[part].astype(np.float64)
        scale = 2.0 ** np.ceil(np.log2(np.abs(block).max() / 448))
        expected[part] = (block / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
        assert np.log2(scale) + 127 == q.scales[index]
    np.testing.assert_array_equal(q.astype(jnp.float32), expected)
    np.testing.assert_array_equal(q.astype(jnp.bfloat16).astype(jnp.float32), expected)
    again = quantize_blocks(q.astype(jnp.float32), axes)  # what was stored in such blocks comes back
    np.testing.assert_array_equal(again.astype(jnp.float32), expected)
    if len(shape) == 4:
        np.testing.assert_array_equal(q[1].astype(jnp.float32), expected[1])


def test_released_experts_in_four_bits_lose_nothing():
    """MXFP4 groups of 32 along the input, their scales up to 2^13 apart."""
    rng = np.random.default_rng(1)
    codes = rng.choice([0, 0.5, 1, 1.5, 2, 3, 4, 6], (256, 128)) * rng.choice([-1, 1], (256, 128))
    x = (codes * np.repeat(2.0 ** rng.integers(-13, 1, (8, 128)), 32, axis=0)).astype(np.float32)
    np.testing.assert_array_equal(quantize_blocks(jnp.asarray(x), (0, 1)).astype(jnp.float32), x)


def test_the_large_matrices_are_narrow_and_nothing_else(model, narrow):
    wide, after = leaves(model), leaves(narrow)
    small_ones = {name for name, value in after.items() if not isinstance(value, QTensor)}
    assert {name.rsplit(".", 1)[1] for name in small_ones} == STAY | {"kv"}
    assert all(".compressor." in name for name in small_ones if name.endswith((".kv", ".gate")))
    assert all(after[name] is wide[name] for name in small_ones)
    assert not any(isinstance(value, QTensor) for value in wide.values()), "the given model is left as it was"
    experts = [value for name, value in after.items() if name.endswith("experts.gate_up")]
    assert experts and all(value.values.nbytes * 4 == 4 * value.values.size for value in experts)


def test_the_model_computes_with_the_narrow_numbers(narrow):
    tokens = np.random.default_rng(2).integers(3, engine_harness.MODEL.vocab_size, (2, 40)).astype(np.int32)
    run = jax.jit(lambda model, tokens: model(tokens))
    expected, got = run(widened(narrow), tokens), run(narrow, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5 * float(jnp.std(expected)))


def test_llm_with_narrow_weights_equals_the_widened_model(tmp_path, model, narrow):
    v4jax.save(model, tmp_path / "hf")
    options = dict(max_num_seqs=1, max_model_len=256, max_num_batched_tokens=16)
    greedy = SamplingParams(max_tokens=8, temperature=0.0)
    of = lambda llm: llm.generate([[5, 6, 7]], greedy)[0].token_ids
    from_disk = LLM(tmp_path / "hf", quantization="fp8", **options)
    assert of(from_disk) == of(LLM(model, quantization="fp8", **options)) == of(LLM(widened(narrow), **options))
    assert any(leaf.dtype == jnp.uint8 for leaf in from_disk.engine.model_runner.weights)
    with pytest.raises(UserError, match="serve.quantization is 'fp4'; one of none, fp8"):
        LLM(model, quantization="fp4")


def test_a_narrow_model_is_not_saved(tmp_path, narrow):
    with pytest.raises(UserError, match="quantized to fp8 cannot be saved"):
        v4jax.save(narrow, tmp_path / "x")
    assert not (tmp_path / "x").exists()
