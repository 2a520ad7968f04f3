"""Public API of the lightning indexer. It selects an implementation by platform."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from v4jax.core.qtensor import QTensor
from v4jax.kernels.dispatch import select
from v4jax.kernels.indexer import ref, xla, xla_cpu, xla_scaled_dot

ReadKeys = Callable[[jax.Array, int, bool], jax.Array | QTensor]
Mask = Callable[[jax.Array, int], jax.Array]

_SCORE = {"ref": ref.score, "xla": xla.score}
_SEARCH = {
    "ref": ref.topk_search,
    "xla": xla.topk_search,
    "xla_cpu": xla_cpu.topk_search,
    "xla_scaled_dot": xla_scaled_dot.topk_search,
}
_PREFERRED = {"cpu": "xla_cpu"}
_PREFERRED_FP8 = _PREFERRED | {"gpu": "xla_scaled_dot"}


def score(q_BTJL: jax.Array, w_BTJ: jax.Array, keys_BCL: jax.Array, *, impl: str | None = None) -> jax.Array:
    """Score every entry for every query: I[t, c] = sum_j w[t, j] relu(q[t, j] . k[c]) (spec 2.6).

    Args:
        q_BTJL: [B, T, J, L], indexer queries.
        w_BTJ: float32 [B, T, J], head weights with the scale folded in. They may be negative.
        keys_BCL: [B, C, L], index keys.
        impl: "ref", "xla", or None for "xla".

    Returns:
        float32 [B, T, C].

    Raises:
        UserError: `impl` is unknown.
    """
    operands = (q_BTJL, w_BTJ, keys_BCL)
    return _SCORE[select(impl, _SCORE, {}, portable="xla", operands=operands)](*operands)


def score_picked(q_BTJL: jax.Array, w_BTJ: jax.Array, keys_BTKL: jax.Array) -> jax.Array:
    """Return `score` where each query has its own K keys [B, T, K, L], float32 [B, T, K]."""
    dots_BTJK = jnp.einsum("BTJL,BTKL->BTJK", q_BTJL, keys_BTKL, preferred_element_type=jnp.float32)
    return jnp.einsum("BTJK,BTJ->BTK", jax.nn.relu(dots_BTJK), w_BTJ)


def topk_search(
    q_BTJL: jax.Array,
    w_BTJ: jax.Array,
    read_keys: ReadKeys,
    mask: Mask,
    *,
    num_entries: int,
    num_visible: jax.Array,
    k: int,
    fp8_queries: bool = False,
    impl: str | None = None,
) -> jax.Array:
    """Return the indices of the k entries that score highest for each query. The result has no gradient.

    Ties go to the lowest index, because relu makes exact zeros common (spec 11.4). transformers has no such rule, since
    torch.topk promises no order. With few heads its top-k indices, and then its logits, may differ.

    Args:
        q_BTJL: [B, T, J, L], indexer queries.
        w_BTJ: float32 [B, T, J], head weights with the scale folded in.
        read_keys: function (first, count, raw_fp8) to the index keys of entries first .. first + count - 1,
            [B, count, L]. With `raw_fp8`, keys that are stored in e4m3 come as a QTensor. An index beyond the last
            entry gives any finite key.
        mask: function (first, count) to bool [B, T, count], True where a query sees the entry.
        num_entries: entries that the storage has room for.
        num_visible: int32 scalar; no query sees entries from this index on, and they are not scored.
        k: number of entries to select.
        fp8_queries: e4m3 holds the queries exactly, because they were rounded to FP4 (spec 2.4). A product in e4m3 then
            loses nothing.
        impl: "ref", "xla", "xla_cpu", "xla_scaled_dot", or None for the preferred one of the platform. "xla_scaled_dot"
            rounds the queries to e4m3 if the keys are stored in it; None selects it for `fp8_queries` alone.

    Returns:
        int32 [B, T, k], by falling score; -1 where a query sees fewer than k entries.

    Raises:
        UserError: `impl` is unknown.
    """
    preferred = _PREFERRED_FP8 if fp8_queries else _PREFERRED
    search = _SEARCH[select(impl, _SEARCH, preferred, portable="xla", operands=(q_BTJL, w_BTJ))]
    q_BTJL, w_BTJ = jax.lax.stop_gradient((q_BTJL, w_BTJ))
    return search(q_BTJL, w_BTJ, read_keys, mask, num_entries=num_entries, num_visible=num_visible, k=k)


def topk_mask(scores_BTC: jax.Array, k: int) -> jax.Array:
    """Return the set that `topk_search` selects as a mask, bool [B, T, C].

    The set holds the scores above the k-th highest, and of those equal to it the ones with the lowest index. Scores of
    entries that a query does not see are -inf.
    """
    scores = jax.lax.stop_gradient(scores_BTC)
    kth = jax.lax.top_k(scores, k)[0][..., -1:]
    above, equal = scores > kth, scores == kth
    room = k - above.sum(-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= room))
