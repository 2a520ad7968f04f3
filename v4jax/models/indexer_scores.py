"""Scores of the lightning indexer, for inspection."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from v4jax.core.errors import UserError
from v4jax.models.transformer import Transformer, full_batch
from v4jax.nn import qdq
from v4jax.nn.indexer import score
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
    shape = model.config
    if "csa" not in shape.layer_types or any(run.repeats > 1 for run in model.stack_specs):
        raise UserError("indexer_scores needs a model with a csa layer, trained with train.scan=false")
    chunk, x_BTXD = full_batch(jnp.asarray(tokens_BT, jnp.int32)), model.embed.embed_streams(tokens_BT)
    blocks = [block for stack in model.stacks for block in stack]
    layer = shape.layer_types.index("csa")
    for block in blocks[:layer]:
        x_BTXD, _, _ = block(x_BTXD, chunk, NoCache())
    block = blocks[layer]
    read, _, _ = block.attn_mhc(x_BTXD)
    x_BTD = block.attn_norm(hc_pre(x_BTXD, read))
    low_BTQ = block.attn.q_norm(einsum("BTD,DQ->BTQ", x_BTD, block.attn.q_down, block.attn.dtype))
    cos, sin = angles(chunk.positions_BT, frequencies(shape.rope, shape.qk_rope_head_dim, compressed=True))
    indexer = block.attn.indexer
    q_BTJL, w_BTJ = indexer.queries(x_BTD, low_BTQ, (cos[:, :, None], sin[:, :, None]))
    keys_BCL, _, _ = indexer.compressor(x_BTD, chunk, NoCache(), "index")
    return score(q_BTJL, w_BTJ, qdq.keys(keys_BCL) if shape.kv_qdq else keys_BCL)
