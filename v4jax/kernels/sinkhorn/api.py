"""Sinkhorn projection of many small matrices at once."""

import jax
import jax.numpy as jnp


def sinkhorn(logits: jax.Array, *, iters: int, eps: float) -> jax.Array:
    """Project logits to doubly stochastic matrices (spec 4.1).

    The loop iterates the row and column factors r and c of P = r B c instead of the matrix P. The result is the same
    with less memory traffic. The loop is not unrolled, so the program does not grow with `iters`. Sums over n are
    written out as additions of token vectors, because XLA:CPU is slow at reductions over such a short axis. A
    hand-written gradient that reads the history of the factors was no faster than autodiff.

    Args:
        logits: [n, n, ...], one n x n matrix per token; axis 0 is the row, axis 1 the column.
        iters: number of column normalizations; `iters - 1` row normalizations alternate with them.
        eps: added to the softmax and to each divisor.

    Returns:
        float32 [n, n, ...], the shape of `logits`.
    """
    n = logits.shape[0]
    b_XYN = jax.nn.softmax(logits.astype(jnp.float32), axis=1) + eps
    if 1 in logits.shape[2:]:  # otherwise keep both token axes: the mesh may shard both, but not a merged axis
        b_XYN = b_XYN.reshape(n, n, -1)

    def row_and_column(factors, _):
        row_XN, column_YN = factors
        row_XN = row_XN / (row_XN * sum(b_XYN[:, k] * column_YN[k] for k in range(n)) + eps)
        column_YN = column_YN / (column_YN * sum(b_XYN[j] * row_XN[j] for j in range(n)) + eps)
        return (row_XN, column_YN), None

    column_YN = 1.0 / (sum(b_XYN[j] for j in range(n)) + eps)
    (row_XN, column_YN), _ = jax.lax.scan(row_and_column, (jnp.ones_like(column_YN), column_YN), length=iters - 1)
    return (row_XN[:, None] * b_XYN * column_YN[None]).reshape(logits.shape)
