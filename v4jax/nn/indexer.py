"""Lightning indexer: it selects the compressed entries that a query attends (spec 2.6)."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.core.qtensor import QTensor, scaled_dot
from v4jax.nn import qdq
from v4jax.nn.attention import MAX_DECODE_QUERIES
from v4jax.nn.compressor import Compressor
from v4jax.nn.kv_cache_interface import EntryReader
from v4jax.nn.linear import einsum, normal_param
from v4jax.nn.rope import rotate

_PIECE = 1024  # entries that are scored at once in a prefill
_FEW_PIECE = 256  # least number of entries that are scored at once in a decode step
# Elements of the index keys in a small piece of a decode step. A big piece has `_BIG` times as many.
_FEW_NUMBERS = 2**17
_BIG = 4
# Backends that multiply keys stored in e4m3 without dequantizing them first. Others get dequantized keys.
_CODED = ("gpu",)
_TILE = 64  # queries that XLA:CPU scores at once; their scores for one piece of keys fit the CPU's caches


class Indexer(nnx.Module):
    """Low-dimensional queries, compressed index keys and a weight per head, all separate from the attention."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        heads, dim = model.indexer.index_n_heads, model.indexer.index_head_dim
        self.rounded, self.dtype, self.scale = model.kv_qdq, jnp.dtype(model.dtype), dim**-0.5 * heads**-0.5
        # A product with keys in e4m3 rounds the queries to e4m3. Only queries rounded to FP4 lose nothing by that.
        self.raw_fp8 = model.kv_qdq and jax.default_backend() in _CODED
        self.q_up = normal_param(rngs, "QJL", (model.q_lora_rank, heads, dim), model.initializer_range)
        self.weight = normal_param(rngs, "DJ", (model.hidden_size, heads), model.initializer_range)
        self.compressor = Compressor(model, "csa", "L", dim, rngs)

    def queries(self, x_BTD: jax.Array, low_BTQ: jax.Array, cos_sin) -> tuple[jax.Array, jax.Array]:
        """Return rotated queries q_BTJL and head weights w_BTJ, which are float32 and include the scale."""
        q = rotate(einsum("BTQ,QJL->BTJL", low_BTQ, self.q_up, self.dtype), cos_sin)
        if self.rounded:
            q = qdq.keys(q)
        w = einsum("BTD,DJ->BTJ", x_BTD, self.weight, self.dtype).astype(jnp.float32) * self.scale
        return q, w


def score(q_BTJL: jax.Array, w_BTJ: jax.Array, keys_BCL: jax.Array | QTensor) -> jax.Array:
    """Return I[t, c] = sum_j w[t, j] relu(q[t, j] . k[c]), float32 [B, T, C].

    Entries are the minor axis throughout, and the sum over heads is a matmul, because XLA:CPU is slow at reductions
    over a middle axis.
    """
    if isinstance(keys_BCL, QTensor):
        B, T, J, L = q_BTJL.shape
        dots_BTJC = scaled_dot(q_BTJL.reshape(B, T * J, L), keys_BCL).reshape(B, T, J, -1)
    else:
        dots_BTJC = jnp.einsum("BTJL,BCL->BTJC", q_BTJL, keys_BCL, preferred_element_type=jnp.float32)
    return jnp.einsum("BTJC,BTJ->BTC", jax.nn.relu(dots_BTJC), w_BTJ)


def score_picked(q_BTJL: jax.Array, w_BTJ: jax.Array, keys_BTKL: jax.Array) -> jax.Array:
    """Return `score` where each query has its own K keys, float32 [B, T, K]."""
    dots_BTJK = jnp.einsum("BTJL,BTKL->BTJK", q_BTJL, keys_BTKL, preferred_element_type=jnp.float32)
    return jnp.einsum("BTJK,BTJ->BTK", jax.nn.relu(dots_BTJK), w_BTJ)


def topk_search(
    q_BTJL: jax.Array, w_BTJ: jax.Array, view: EntryReader, readable, limit: jax.Array, k: int, coded: bool = False
) -> jax.Array:
    """Return the indices of the k entries that score highest for each query. The result has no gradient.

    Ties go to the lowest index, because relu makes exact zeros common (spec 11.4). transformers has no such rule, since
    torch.topk promises no order. With few heads its top-k indices, and then its logits, may differ. Entries are scored
    in pieces, so the scores of all entries never exist at once. The best entries so far are concatenated before those
    of a piece, which keeps the order of ties.

    Args:
        q_BTJL: indexer queries.
        w_BTJ: float32 head weights.
        view: reader of the index keys.
        readable: function (first, count) that returns the mask of a piece, bool [B, T, count].
        limit: int32 scalar; no query sees entries from this index on, and they are not scored.
        k: number of entries to select.
        coded: read keys that are stored in e4m3 without dequantizing (see `EntryReader.read_index_keys`).

    Returns:
        int32 [B, T, k], -1 where a query sees fewer than k entries.
    """
    B, T, _, L = q_BTJL.shape
    q_BTJL, w_BTJ = jax.lax.stop_gradient((q_BTJL, w_BTJ))
    few = T <= MAX_DECODE_QUERIES
    piece = min(max(_FEW_PIECE, _FEW_NUMBERS // (B * L)) if few else _PIECE, view.size)
    big = _BIG * piece if few and _BIG * piece <= view.size else piece

    def look(first, count, best):
        values_BTK, picks_BTK = best
        keys_BCL = jax.lax.stop_gradient(view.read_index_keys(first, count, coded))
        if isinstance(keys_BCL, QTensor):
            scores = score(q_BTJL, w_BTJ, keys_BCL)
        elif few:
            scores = _score_few(q_BTJL, w_BTJ, keys_BCL)
        else:
            scores = jax.lax.platform_dependent(q_BTJL, w_BTJ, keys_BCL, cpu=_score_tiled, default=score)
        scores = jnp.where(scores == 0, 0.0, scores)  # top_k sorts -0 below +0; products of relu give both
        scores = jnp.where(readable(first, count), scores, -jnp.inf)
        index = jnp.broadcast_to(first + jnp.arange(count, dtype=jnp.int32), scores.shape)
        values_BTK, at = jax.lax.top_k(jnp.concatenate([values_BTK, scores], -1), k)
        return values_BTK, jnp.take_along_axis(jnp.concatenate([picks_BTK, index], -1), at, -1)

    best, done = (jnp.full((B, T, k), -jnp.inf), jnp.full((B, T, k), -1, jnp.int32)), 0
    if big > piece:  # full big pieces first, so that few entries remain for small pieces
        done = limit // big
        best = jax.lax.fori_loop(0, done, lambda i, best: look(i * big, big, best), best)
        done *= big // piece
    return jax.lax.fori_loop(done, -(-limit // piece), lambda i, best: look(i * piece, piece, best), best)[1]


def _score_few(q_BTJL: jax.Array, w_BTJ: jax.Array, keys_BCL: jax.Array) -> jax.Array:
    """Return `score` for a few queries, with the keys as the left matmul operand.

    XLA:CPU would transpose keys that are the right operand, all of them in every step. The sum over heads is one matmul
    over the heads of all queries, in which each query has its own column of weights.
    """
    dots_BCTJ = jnp.einsum("BCL,BTJL->BCTJ", keys_BCL, q_BTJL, preferred_element_type=jnp.float32)
    B, C, T, J = dots_BCTJ.shape
    own_TT = jnp.eye(T, dtype=w_BTJ.dtype)
    w_BXT = jnp.einsum("BTJ,TU->BTJU", w_BTJ, own_TT).reshape(B, T * J, T)
    scores_BCT = jnp.einsum("BCX,BXT->BCT", jax.nn.relu(dots_BCTJ).reshape(B, C, T * J), w_BXT)
    return jnp.moveaxis(scores_BCT, 1, 2)


def _score_tiled(q_BTJL: jax.Array, w_BTJ: jax.Array, keys_BCL: jax.Array) -> jax.Array:
    """Return `score`, computed in tiles of queries so that the scores of single heads stay in the CPU caches."""
    B, T, J, L = q_BTJL.shape
    size = min(_TILE, T)
    if T % size:
        return score(q_BTJL, w_BTJ, keys_BCL)
    tiles = lambda a: a.reshape(B * (T // size), 1, size, *a.shape[2:])
    row = jnp.repeat(jnp.arange(B), T // size)
    one = lambda tile: score(*tile[:2], jax.lax.dynamic_slice_in_dim(keys_BCL, tile[2], 1))
    return jax.lax.map(one, (tiles(q_BTJL), tiles(w_BTJ), row)).reshape(B, T, -1)


def causal_mask(seq_index_BT: jax.Array, ratio: int, first: jax.Array | int, count: int) -> jax.Array:
    """Return bool [B, T, count], True if a query sees the entry, for entries from `first` on.

    Query t sees entry i if i < (t + 1) // ratio (spec 2.5).
    """
    return first + jnp.arange(count) < ((seq_index_BT + 1) // ratio)[..., None]
