"""Scores of the lightning indexer, for inspection."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from v4jax.core.errors import UserError
from v4jax.kernels.indexer import score
from v4jax.models.transformer import Transformer, full_batch
from v4jax.nn import qdq
from v4jax.nn.kv_cache_interface import NoCache
from v4jax.nn.linear import einsum
from v4jax.nn.mhc import hc_pre
from v4jax.nn.rope import angles, frequencies


@jax.jit
def indexer_scores(model: Transformer, tokens_BT: jax.Array) -> jax.Array:
    """Scores of the lightning indexer of the first CSA layer (spec 2.6).

    Args:
        model: A model whose layers are not stacked (`train.scan=false`).
        tokens_BT: int32 [B, T], each row a full sequence from its first token.

    Returns:
        float32 [B, T, C], for each query the scores of all C = T // compress_rate_csa entries, later ones included.
        The layer attends to the `indexer.index_topk` highest-scored entries among those complete before the query.

    Raises:
        UserError: The model has no CSA layer, or its layers are stacked.
    """
    shape, kinds = model.config, [layer.attention for layer in model.config.layers]
    if "csa" not in kinds or any(spec.repeats > 1 for spec in model.stack_specs):
        raise UserError("indexer_scores needs a model with a csa layer, trained with train.scan=false")
    chunk, x_BTXD = full_batch(jnp.asarray(tokens_BT, jnp.int32)), model.embed.embed_streams(tokens_BT)
    layers = [layer for stack in model.stacks for layer in stack]
    first = kinds.index("csa")
    for layer in layers[:first]:
        x_BTXD, _, _ = layer(x_BTXD, chunk, NoCache())
    layer = layers[first]
    read, _, _ = layer.attn_mhc(x_BTXD)
    x_BTD = layer.attn_norm(hc_pre(x_BTXD, read))
    low_BTQ = layer.attn.q_norm(einsum("BTD,DQ->BTQ", x_BTD, layer.attn.q_down, layer.attn.dtype))
    cos, sin = angles(chunk.positions_BT, frequencies(shape.rope, shape.qk_rope_head_dim, compressed=True))
    indexer = layer.attn.indexer
    q_BTJL, w_BTJ = indexer.queries(x_BTD, low_BTQ, (cos[:, :, None], sin[:, :, None]))
    keys_BCL, _, _ = indexer.compressor(x_BTD, chunk, NoCache(), "index")
    return score(q_BTJL, w_BTJ, qdq.keys(keys_BCL) if shape.kv_qdq else keys_BCL)
