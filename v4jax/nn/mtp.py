"""Multi-token prediction (spec 5.1): one more layer that predicts the token after the next."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.core.layer_spec import LayerSpec
from v4jax.nn.decoder_layer import DecoderLayer
from v4jax.nn.kv_cache_interface import ForwardBatch, LayerCache
from v4jax.nn.linear import einsum, normal_param
from v4jax.nn.mhc import HyperHead
from v4jax.nn.norm import RMSNorm


class MTP(nnx.Module):
    """A decoder layer over (streams of the last layer, embedding of the next token); shares embedding and head."""

    def __init__(self, model: config.Model, layer: LayerSpec, rngs: nnx.Rngs):
        D = model.hidden_size
        self.dtype = jnp.dtype(model.dtype)
        self.embed_norm, self.hidden_norm = RMSNorm("D", D, model.rms_norm_eps), RMSNorm("D", D, model.rms_norm_eps)
        self.embed_proj = normal_param(rngs, "DO", (D, D), model.initializer_range)
        self.hidden_proj = normal_param(rngs, "DO", (D, D), model.initializer_range)
        self.block = DecoderLayer(model, layer, rngs)
        self.head_mhc = HyperHead(model, rngs)
        self.norm = RMSNorm("D", D, model.rms_norm_eps)

    def __call__(self, x_BTXD: jax.Array, next_BTD: jax.Array, chunk: ForwardBatch, past: LayerCache):
        """Apply the MTP layer.

        Args:
            x_BTXD: all residual streams of the last backbone layer; the collapsed state is not enough (spec 5.1).
            next_BTD: embedding of the token after each position.
            chunk: the tokens of the call.
            past: the layer's cache before the call.

        Returns:
            The layer's output streams, the changed cache, and the auxiliary values of `DecoderLayer`.
        """
        hidden = einsum("BTXD,DO->BTXO", self.hidden_norm(x_BTXD), self.hidden_proj, self.dtype)
        embed = einsum("BTD,DO->BTO", self.embed_norm(next_BTD), self.embed_proj, self.dtype)
        return self.block(hidden + embed[:, :, None], chunk, past)

    def read(self, x_BTXD: jax.Array) -> jax.Array:
        """Return the input h_BTD of the shared head, computed from the layer's streams."""
        return self.norm(self.head_mhc(x_BTXD))
