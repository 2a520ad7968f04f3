"""Token embedding and language-model head."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.nn.linear import normal_param
from v4jax.parallel.rules import constrain


class Embed(nnx.Module):
    """Token embedding table."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        self.copies, self.dtype = model.mhc.hc_mult, jnp.dtype(model.dtype)
        self.table = normal_param(rngs, "VD", (model.vocab_size, model.hidden_size), model.initializer_range)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Return the embeddings [B, T, D] of int32 token ids [B, T]."""
        # Constrain the result. Otherwise XLA replicates the whole batch if the table is split by D.
        return constrain(self.table[...][tokens_BT].astype(self.dtype), "BTD")

    def embed_streams(self, tokens_BT: jax.Array) -> jax.Array:
        """Return the embedding copied into every residual stream, unscaled, [B, T, X, D] (spec 4.1)."""
        x_BTD = self(tokens_BT)
        return jnp.broadcast_to(x_BTD[:, :, None], (*x_BTD.shape[:2], self.copies, x_BTD.shape[2]))


class LMHead(nnx.Module):
    """Projection to the vocabulary; never tied to the embedding."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        self.weight = normal_param(rngs, "DV", (model.hidden_size, model.vocab_size), model.initializer_range)

    def __call__(self, h_BTD: jax.Array) -> jax.Array:
        """Return float32 logits [B, T, V]; the weight is cast to float32 as in the released model (spec 4.3)."""
        return jnp.einsum("BTD,DV->BTV", h_BTD.astype(jnp.float32), self.weight[...].astype(jnp.float32))
