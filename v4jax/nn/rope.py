"""Rotary embedding: adjacent pairs, last `rope_dim` channels, YaRN on compressed layers only (spec 2.3)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import config


@functools.cache
def frequencies(rope: config.Rope, dim: int, compressed: bool) -> np.ndarray:
    """Angular frequency of each of the dim / 2 pairs, float32 [dim / 2].

    Layers without compression: theta^(-2j/dim). Compressed layers: their own theta, and YaRN where its factor is
    above 1, with no attention factor (spec 2.3, golden values in the tests).
    """
    theta = rope.compress_theta if compressed else rope.theta
    freq = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if compressed and rope.yarn_factor > 1:
        turns_at = lambda beta: dim * math.log(rope.yarn_original / (2 * math.pi * beta)) / (2 * math.log(theta))
        low = max(math.floor(turns_at(rope.yarn_beta_fast)), 0)
        high = min(math.ceil(turns_at(rope.yarn_beta_slow)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        freq = freq * (1 - ramp) + freq / rope.yarn_factor * ramp
    return freq.astype(np.float32)


def angles(positions: jax.Array, freq: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [*positions.shape, dim / 2]."""
    angle = positions[..., None].astype(jnp.float32) * freq
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], inverse: bool = False) -> jax.Array:
    """Rotate the pairs (2j, 2j+1) of the last channels of x [..., H] by angles that broadcast to [..., dim / 2].

    `inverse` turns back (the output de-rotation, step 11 of spec 2.3). Rotation in float32, result in x.dtype.
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
