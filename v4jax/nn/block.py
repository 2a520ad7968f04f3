"""One layer: attention and experts, each inside its hyper-connection (spec 4.2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.nn.csa import CSAttention
from v4jax.nn.hca import HCAttention
from v4jax.nn.mhc import HyperConnection, read_streams, write_streams
from v4jax.nn.moe import Moe
from v4jax.nn.norm import RMSNorm
from v4jax.nn.state import Chunk, Past
from v4jax.nn.window import WindowAttention

ATTENTION = {"swa": WindowAttention, "csa": CSAttention, "hca": HCAttention}


class Block(nnx.Module):
    """A layer of attention kind `kind`; `hashed` says how its router chooses."""

    def __init__(self, model: config.Model, kind: str, hashed: bool, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm("D", model.hidden_size, model.norm_eps)
        self.attn_mhc = HyperConnection(model, rngs)
        self.attn = ATTENTION[kind](model, rngs)
        self.ffn_norm = RMSNorm("D", model.hidden_size, model.norm_eps)
        self.ffn_mhc = HyperConnection(model, rngs)
        self.ffn = Moe(model, hashed, rngs)

    def __call__(self, x_BTXD: jax.Array, chunk: Chunk, past: Past) -> tuple[jax.Array, Past, dict[str, jax.Array]]:
        """Streams x_BTXD through the layer; the past with this call in it; losses and expert loads."""
        read, write, mix = self.attn_mhc(x_BTXD)
        y_BTD, past, index_BT = self.attn(self.attn_norm(read_streams(x_BTXD, read)), chunk, past)
        x_BTXD = write_streams(x_BTXD, y_BTD, write, mix)
        read, write, mix = self.ffn_mhc(x_BTXD)
        y_BTD, balance, load_E = self.ffn(self.ffn_norm(read_streams(x_BTXD, read)), chunk)
        real_BT = jnp.ones_like(index_BT) if chunk.segments_BT is None else chunk.segments_BT > 0
        aux = {
            "balance": balance,
            "indexer": jnp.sum(index_BT * real_BT) / jnp.maximum(real_BT.sum(), 1),
            "load_E": load_E,
        }
        return write_streams(x_BTXD, y_BTD, write, mix), past, aux
