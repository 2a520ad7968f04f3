"""Rotary embedding: adjacent pairs, last `qk_rope_head_dim` channels, YaRN on compressed layers only (spec 2.3)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import config


@functools.cache
def frequencies(rope: config.RoPE, dim: int, compressed: bool) -> np.ndarray:
    """Return the angular frequency of each pair of rotary channels.

    The values are those of the released `precompute_freqs_cis` and of transformers, bit for bit at the published
    shapes. Each operation there rounds to float32, and at position 1e6 a frequency that is off by one ulp turns by up
    to 0.06 rad more. Only the power is computed in float64 and rounded once, since numpy's float32 power is off by an
    ulp.

    Args:
        rope: bases and YaRN fields.
        dim: number of rotary channels, even.
        compressed: True for CSA and HCA layers, which have their own base and YaRN without an attention factor; False
            for layers without compression, which have neither.

    Returns:
        float32 [dim / 2], radians per position (spec 2.3, golden values in the tests).
    """
    theta = np.float32(rope.compress_rope_theta if compressed else rope.rope_theta)
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)
    freq = np.float32(1) / power
    if not compressed or rope.yarn_factor == 1:
        return freq
    low, high = _correction_range(rope, dim)
    if low == high:
        high += 0.001  # as in the release: a ramp of width 0 would divide by 0
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = np.float32(1) - ramp
    interpolated = np.float32(1) / (np.float32(rope.yarn_factor) * power)
    return interpolated * (np.float32(1) - kept) + freq * kept


def _correction_range(rope: config.RoPE, dim: int) -> tuple[int, int]:
    """Return first and last pair of YaRN's ramp, clipped to the channels (spec 2.3).

    If beta_fast is below beta_slow, the range and the ramp are reversed, because the reference does not refuse that.
    """
    turns = lambda beta: rope.yarn_original / (beta * 2 * math.pi)
    bound = lambda beta: dim * math.log(turns(beta)) / (2 * math.log(rope.compress_rope_theta))
    low, high = math.floor(bound(rope.yarn_beta_fast)), math.ceil(bound(rope.yarn_beta_slow))
    return max(low, 0), min(high, dim - 1)


def angles(positions: jax.Array, freq: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin of the rotary angles, float32 [*positions.shape, dim / 2]."""
    angle = positions[..., None].astype(jnp.float32) * freq
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], inverse: bool = False) -> jax.Array:
    """Rotate the pairs (2j, 2j+1) of the last channels of x [..., H] by angles that broadcast to [..., dim / 2].

    `inverse` rotates back (the de-rotation of the output, step 11 of spec 2.3). The rotation is computed in float32 and
    the result has x.dtype.
    """
    cos, sin = cos_sin
    half = cos.shape[-1]
    head, tail = x[..., : -2 * half], x[..., -2 * half :]
    pairs = tail.astype(jnp.float32).reshape(*tail.shape[:-1], half, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    if inverse:
        sin = -sin
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(tail.shape).astype(x.dtype)
    return jnp.concatenate([head, turned], axis=-1)
