"""Top-k search with scores in the operand order and in the tiles that XLA:CPU computes fastest."""

import jax
import jax.numpy as jnp

from v4jax.kernels.indexer import xla
from v4jax.kernels.tuning import tuned


def topk_search(q_BTJL, w_BTJ, read_keys, mask, **sizes) -> jax.Array:
    """See `api.topk_search`."""
    few = q_BTJL.shape[1] <= tuned("attention")["max_decode_queries"]
    score_pass = score_decode if few else score_tiled
    return xla.topk_search(q_BTJL, w_BTJ, read_keys, mask, score_pass=score_pass, **sizes)


def score_decode(q_BTJL, w_BTJ, keys_BCL) -> jax.Array:
    """Return `api.score` for the few queries of a decode step, with the keys as the left matmul operand.

    XLA:CPU would transpose keys that are the right operand, all of them in every step. The sum over heads is one matmul
    over the heads of all queries, in which each query has its own column of weights.
    """
    dots_BCTJ = jnp.einsum("BCL,BTJL->BCTJ", keys_BCL, q_BTJL, preferred_element_type=jnp.float32)
    B, C, T, J = dots_BCTJ.shape
    own_TT = jnp.eye(T, dtype=w_BTJ.dtype)
    w_BXT = jnp.einsum("BTJ,TU->BTJU", w_BTJ, own_TT).reshape(B, T * J, T)
    scores_BCT = jnp.einsum("BCX,BXT->BCT", jax.nn.relu(dots_BCTJ).reshape(B, C, T * J), w_BXT)
    return jnp.moveaxis(scores_BCT, 1, 2)


def score_tiled(q_BTJL, w_BTJ, keys_BCL, query_tile: int | None = None) -> jax.Array:
    """Return `api.score`, computed in tiles of queries so that the scores of single heads stay in the CPU caches.

    `query_tile` is the number of queries of a tile; None takes the tuned one. A number of queries that is no multiple
    of it is computed at once.
    """
    B, T = q_BTJL.shape[:2]
    size = min(query_tile or tuned("indexer")["query_tile"], T)
    if T % size:
        return xla.score(q_BTJL, w_BTJ, keys_BCL)
    tiles = lambda a: a.reshape(B * (T // size), 1, size, *a.shape[2:])
    row = jnp.repeat(jnp.arange(B), T // size)
    one = lambda tile: xla.score(*tile[:2], jax.lax.dynamic_slice_in_dim(keys_BCL, tile[2], 1))
    return jax.lax.map(one, (tiles(q_BTJL), tiles(w_BTJ), row)).reshape(B, T, -1)
