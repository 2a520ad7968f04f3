"""Reference of attention over a subset of the keys: float32, one query and head at a time (spec 2.3, step 9).

It reads a paged cache through its operands, and so computes addresses and decodes rows as a fused kernel does.
"""

import jax
import jax.numpy as jnp

from v4jax.kernels.attention.softmax_partial import MASKED_MAX, SoftmaxPartial


def attend(q_BTNH, keys, mask_BTS):
    """See `api.attend`."""

    def head(q_H, keys_SH, mask_S):
        """Maximum, sum, output [H] and exp(logit - max) [S]: the softmax of q . k / sqrt(H) before its division."""
        logits_S = jnp.where(mask_S, jnp.dot(keys_SH, q_H, precision="highest") * q_H.size**-0.5, -jnp.inf)
        peak = jax.lax.stop_gradient(jnp.maximum(logits_S.max(), MASKED_MAX))
        p_S = jnp.exp(logits_S - peak)
        return peak, p_S.sum(), jnp.dot(p_S, keys_SH, precision="highest"), p_S

    heads = jax.vmap(head, in_axes=(0, None, None))
    queries = jax.vmap(heads, in_axes=(0, None if keys.ndim == 3 else 0, 0))
    peak, total, o_BTNH, p_BTNS = jax.vmap(queries)(q_BTNH.astype(jnp.float32), keys.astype(jnp.float32), mask_BTS)
    return SoftmaxPartial(peak[..., None], total[..., None], o_BTNH), p_BTNS


def attend_topk(q_BTNH, entries, picks_BTK):
    """See `api.attend_topk`."""
    if (operands := entries.operands()) is None:
        rows_BTKH, entries = entries.gather_entries(picks_BTK)
    else:
        rows_BTKH, _ = operands.gather_entries(picks_BTK)
    return *attend(q_BTNH, rows_BTKH, picks_BTK >= 0), entries
