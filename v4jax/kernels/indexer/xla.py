"""Indexer scores as two einsums, and a top-k over passes of entries."""

import jax
import jax.numpy as jnp

from v4jax.kernels.tuning import tuned


def score(q_BTJL, w_BTJ, keys_BCL):
    """See `api.score`.

    Entries are the minor axis throughout, and the sum over heads is a matmul, because XLA:CPU is slow at reductions
    over a middle axis.
    """
    dots_BTJC = jnp.einsum("BTJL,BCL->BTJC", q_BTJL, keys_BCL, preferred_element_type=jnp.float32)
    return jnp.einsum("BTJC,BTJ->BTC", jax.nn.relu(dots_BTJC), w_BTJ)


def topk_search(
    q_BTJL, w_BTJ, read_keys, mask, *, num_entries, num_visible, k, score_pass=score, raw_fp8=False
) -> jax.Array:
    """See `api.topk_search`.

    Entries are scored in passes, so the scores of all entries never exist at once. The best entries so far are
    concatenated before those of a pass, which keeps the order of ties.

    Args:
        score_pass: function (q_BTJL, w_BTJ, keys_BCL) to the scores of the entries of a pass.
        raw_fp8: read keys that are stored in e4m3 without dequantizing them.
    """
    size, large = _entries_per_pass(q_BTJL.shape, num_entries)

    def scan(first, count, best):
        values_BTK, picks_BTK = best
        keys_BCL = jax.lax.stop_gradient(read_keys(first, count, raw_fp8))
        scores = score_pass(q_BTJL, w_BTJ, keys_BCL)
        scores = jnp.where(scores == 0, 0.0, scores)  # top_k sorts -0 below +0; products of relu give both
        scores = jnp.where(mask(first, count), scores, -jnp.inf)
        index = jnp.broadcast_to(first + jnp.arange(count, dtype=jnp.int32), scores.shape)
        values_BTK, at = jax.lax.top_k(jnp.concatenate([values_BTK, scores], -1), k)
        return values_BTK, jnp.take_along_axis(jnp.concatenate([picks_BTK, index], -1), at, -1)

    B, T = q_BTJL.shape[:2]
    best, done = (jnp.full((B, T, k), -jnp.inf), jnp.full((B, T, k), -1, jnp.int32)), 0
    if large > size:  # full large passes first, so that few entries remain for small passes
        done = num_visible // large
        best = jax.lax.fori_loop(0, done, lambda i, best: scan(i * large, large, best), best)
        done *= large // size
    return jax.lax.fori_loop(done, -(-num_visible // size), lambda i, best: scan(i * size, size, best), best)[1]


def _entries_per_pass(queries: tuple[int, ...], num_entries: int) -> tuple[int, int]:
    """Return the entries of a small pass and of a large one; both are equal if there are no large passes.

    Args:
        queries: shape [B, T, J, L] of the queries. The passes of a decode step hold a number of key elements, whatever
            the batch.
        num_entries: entries that the storage has room for.
    """
    numbers, (B, T, _, L) = tuned("indexer"), queries
    if T > tuned("attention")["max_decode_queries"]:
        size = min(numbers["entries_per_prefill_pass"], num_entries)
        return size, size
    size = max(numbers["min_entries_per_decode_pass"], numbers["key_elements_per_decode_pass"] // (B * L))
    size = min(size, num_entries)
    large = numbers["decode_passes_per_large_pass"] * size
    return size, large if large <= num_entries else size
