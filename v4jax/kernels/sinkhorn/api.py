"""Sinkhorn projection of many small matrices at once."""

import jax
import jax.numpy as jnp


def sinkhorn(logits_XYN: jax.Array, *, iters: int, eps: float) -> jax.Array:
    """Logits [n, n, ...tokens] to doubly stochastic matrices of the same shape, float32 (spec 4.1).

    Instead of the matrix its row and column factors are iterated, B = r A c: the same numbers at a quarter of the
    traffic, and the loop is a rolled one, so the program does not grow with `iters` (mistake 19).
    """
    b = jax.nn.softmax(logits_XYN.astype(jnp.float32), axis=1) + eps

    def half_steps(factors, _):
        row, column = factors
        row = row / (row * jnp.sum(b * column[None], axis=1) + eps)
        column = column / (column * jnp.sum(b * row[:, None], axis=0) + eps)
        return (row, column), None

    column = 1.0 / (jnp.sum(b, axis=0) + eps)
    (row, column), _ = jax.lax.scan(half_steps, (jnp.ones_like(column), column), length=iters - 1)
    return row[:, None] * b * column[None]
