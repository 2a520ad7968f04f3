"""Heavily compressed attention (spec 2.7): every visible entry is read, and there are few."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.nn.compressor import Compressor
from v4jax.nn.indexer import visible
from v4jax.nn.state import Chunk, Past
from v4jax.nn.window import WindowAttention


class HCAttention(WindowAttention):
    """A window layer that also attends all its compressed entries."""

    kind = "hca"

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        super().__init__(model, rngs)
        self.compressor = Compressor(model, self.kind, "H", model.head_dim, rngs)

    def compress(self, x_BTD: jax.Array, chunk: Chunk, past: Past) -> Past:
        kv_BCH, windows, past = self.compressor(x_BTD, chunk, past, "main")
        return past.extend(kv_BCH, None, windows, chunk, self.compressor.ratio)

    def remote(self, extra, order_BT, segments_BT, past: Past):
        if not past.entries.kv_BCH.shape[1]:  # a fresh call shorter than one window
            return None
        mask_BTC = readable(order_BT, segments_BT, past, self.compressor.ratio)
        return past.entries.kv_BCH, mask_BTC, None


def readable(order_BT: jax.Array, segments_BT: jax.Array | None, past: Past, ratio: int) -> jax.Array:
    """Entries that are complete for a query and of its own document: bool [B, T, C]."""
    mask_BTC = visible(order_BT, ratio, past.entries.kv_BCH.shape[1])
    if segments_BT is not None:
        mask_BTC &= segments_BT[:, :, None] == past.entries.segments_BC[:, None, :]
    return jnp.broadcast_to(mask_BTC, (past.entries.kv_BCH.shape[0], *mask_BTC.shape[1:]))
