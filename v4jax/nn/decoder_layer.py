"""One layer: attention and MLP, each wrapped in a hyper-connection (spec 4.2). A `LayerSpec` names their classes."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.core.layer_spec import LayerSpec
from v4jax.nn.attention import SlidingWindowAttention
from v4jax.nn.csa import CompressedSparseAttention
from v4jax.nn.hca import HeavilyCompressedAttention
from v4jax.nn.kv_cache_interface import ForwardBatch, LayerCache
from v4jax.nn.mhc import HyperConnection, hc_post, hc_pre
from v4jax.nn.moe import MoE
from v4jax.nn.norm import RMSNorm
from v4jax.nn.router import HashRouter, TopKRouter

# The class of each `LayerSpec.attention` and `LayerSpec.mlp`.
ATTENTION = {cls.kind: cls for cls in (SlidingWindowAttention, CompressedSparseAttention, HeavilyCompressedAttention)}
MLP = {
    "moe": functools.partial(MoE, TopKRouter),
    "hash_moe": functools.partial(MoE, HashRouter),
}


class DecoderLayer(nnx.Module):
    """One layer with the attention and the MLP that `layer` names."""

    def __init__(self, model: config.Model, layer: LayerSpec, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm("D", model.hidden_size, model.rms_norm_eps)
        self.attn_mhc = HyperConnection(model, rngs)
        self.attn = ATTENTION[layer.attention](model, rngs)
        self.ffn_norm = RMSNorm("D", model.hidden_size, model.rms_norm_eps)
        self.ffn_mhc = HyperConnection(model, rngs)
        self.ffn = MLP[layer.mlp](model, rngs)

    def __call__(
        self, x_BTXD: jax.Array, chunk: ForwardBatch, past: LayerCache
    ) -> tuple[jax.Array, LayerCache, dict[str, jax.Array]]:
        """Apply the layer to the residual streams x_BTXD.

        Returns:
            Streams x_BTXD, the cache with this call's tokens, and a dict of float32 arrays: "balance" (scalar, balance
            loss), "indexer" (scalar, mean indexer loss) and "load_E" ([E], tokens per expert). Only valid tokens count.
        """
        read, write, mix = self.attn_mhc(x_BTXD)
        y_BTD, past, index_BT = self.attn(self.attn_norm(hc_pre(x_BTXD, read)), chunk, past)
        x_BTXD = hc_post(x_BTXD, y_BTD, write, mix)
        read, write, mix = self.ffn_mhc(x_BTXD)
        y_BTD, balance, load_E = self.ffn(self.ffn_norm(hc_pre(x_BTXD, read)), chunk)
        valid_BT = jnp.ones_like(index_BT) if chunk.valid_BT is None else chunk.valid_BT
        aux = {
            "balance": balance,
            "indexer": jnp.sum(index_BT * valid_BT) / jnp.maximum(valid_BT.sum(), 1),
            "load_E": load_E,
        }
        return hc_post(x_BTXD, y_BTD, write, mix), past, aux
