"""Softmax attention over a subset of the keys, before the division by the sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from v4jax.core.pytree import pytree

MASKED_MAX = -1e30  # lower bound of the logit maximum; finite, so that a fully masked query sums to 0 and not to NaN


@pytree
class SoftmaxPartial:
    """Unnormalized attention over a subset of the keys, per query and head, all float32 (arXiv 2205.14135).

    Attributes:
        max_BTN1: maximum of the logits, at least MASKED_MAX. It has no gradient, because no normalized result depends
            on it.
        sum_BTN1: sum of exp(logit - max).
        o_BTNH: sum of exp(logit - max) times the value.
    """

    max_BTN1: jax.Array
    sum_BTN1: jax.Array
    o_BTNH: jax.Array

    def merge(self, other: SoftmaxPartial) -> SoftmaxPartial:
        """Return the attention over the union of both subsets, which must be disjoint."""
        peak = jnp.maximum(self.max_BTN1, other.max_BTN1)
        a, b = jnp.exp(self.max_BTN1 - peak), jnp.exp(other.max_BTN1 - peak)
        return SoftmaxPartial(peak, self.sum_BTN1 * a + other.sum_BTN1 * b, self.o_BTNH * a + other.o_BTNH * b)

    def normalize(self, sink_N: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Divide by the sum over the keys and the attention sink (spec 2.3, steps 10 and 11).

        Args:
            sink_N: [N], logit of each head whose value is 0.

        Returns:
            The attention output [B, T, N, H], and maximum and sum of the softmax with the sink [B, T, N, 1], all
            float32.
        """
        sink_N1 = sink_N.astype(jnp.float32)[:, None]
        peak = jnp.maximum(self.max_BTN1, jax.lax.stop_gradient(sink_N1))
        shrink = jnp.exp(self.max_BTN1 - peak)
        total = self.sum_BTN1 * shrink + jnp.exp(sink_N1 - peak)
        return self.o_BTNH * (shrink / total), peak, total
