"""Attention over a subset of the keys as two einsums."""

import jax
import jax.numpy as jnp

from v4jax.kernels.attention.softmax_partial import MASKED_MAX, SoftmaxPartial


def attend(q_BTNH, keys, mask_BTS):
    """See `api.attend`. Products accumulate in float32; exp(logit - max) is cast to the keys' dtype for the second."""
    letters, keys = key_letters(keys), keys.astype(q_BTNH.dtype)
    dots_BTNS = jnp.einsum(f"BTNH,{letters}->BTNS", q_BTNH, keys, preferred_element_type=jnp.float32)
    return partial_softmax(dots_BTNS, keys, mask_BTS)


def attend_topk(q_BTNH, entries, picks_BTK, attend=attend):
    """See `api.attend_topk`. `attend` computes the softmax of the gathered rows."""
    rows_BTKH, entries = entries.gather_entries(picks_BTK)
    return *attend(q_BTNH, rows_BTKH, picks_BTK >= 0), entries


def key_letters(keys: jax.Array) -> str:
    """Return the axes of keys that all queries of a batch row share, or that each query has for itself."""
    return "BSH" if keys.ndim == 3 else "BTSH"


def partial_softmax(dots_BTNS: jax.Array, keys: jax.Array, mask_BTS: jax.Array) -> tuple[SoftmaxPartial, jax.Array]:
    """Return the partial softmax and exp(logit - max), given the products of queries and keys."""
    logits = jnp.where(mask_BTS[:, :, None], dots_BTNS * keys.shape[-1] ** -0.5, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), MASKED_MAX))
    p_BTNS = jnp.exp(logits - peak)
    second = f"BTNS,{key_letters(keys)}->BTNH"
    o_BTNH = jnp.einsum(second, p_BTNS.astype(keys.dtype), keys, preferred_element_type=jnp.float32)
    return SoftmaxPartial(peak, p_BTNS.sum(-1, keepdims=True), o_BTNH), p_BTNS
