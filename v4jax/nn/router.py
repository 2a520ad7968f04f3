"""Routing of tokens to experts (spec 3.1): sqrt-softplus scores, and top-k with a bias or a table by token id."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.nn.linear import Buffer, normal_param
from v4jax.parallel.context_parallel import shard_local


class Router(nnx.Module):
    """The interface of all routers, and what those of DeepSeek-V4 share. A subclass chooses the experts.

    Attributes:
        has_balance_loss: whether training adds the balance loss of the layer (spec 3.3).
    """

    has_balance_loss = True

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        moe = model.moe
        self.active, self.scale = moe.num_experts_per_tok, moe.routed_scaling_factor
        self.weight = normal_param(rngs, "DE", (model.hidden_size, moe.n_routed_experts), model.initializer_range)

    def __call__(self, x_BTD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Choose the experts of each token and weigh their outputs.

        Args:
            x_BTD: inputs of the layer.
            tokens_BT: int32 token ids.

        Returns:
            The experts picks_BTK (int32), their weights_BTK and the scores_BTE of all experts (float32).
        """
        scores_BTE = self.scores(x_BTD)
        picks_BTK = self.choose(scores_BTE, tokens_BT)
        chosen_BTK = jnp.take_along_axis(scores_BTE, picks_BTK, axis=-1)
        weights_BTK = self.scale * chosen_BTK / (chosen_BTK.sum(-1, keepdims=True) + 1e-20)
        return picks_BTK, weights_BTK, scores_BTE

    def scores(self, x_BTD: jax.Array) -> jax.Array:
        """Return the positive affinity of each token to each expert, float32 [B, T, E]."""
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), self.weight[...].astype(jnp.float32))
        # Below -87 softplus underflows to 0, where the gradient of the square root is NaN.
        return jnp.sqrt(jax.nn.softplus(jnp.maximum(logits_BTE, -80.0)))

    def choose(self, scores_BTE: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """Return the K distinct experts of each token, int32 [B, T, K]."""
        raise NotImplementedError


class TopKRouter(Router):
    """Chooses the experts with the highest sums of score and bias. The bias never changes their weights."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        super().__init__(model, rngs)
        self.bias = Buffer(jnp.zeros(model.moe.n_routed_experts, jnp.float32), letters="E")

    def choose(self, scores_BTE: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """Return the top K of score plus bias."""
        # Run top-k on local tokens. Otherwise XLA:CPU gathers the scores of all rows on every device.
        top_k = lambda scores_BTE: jax.lax.top_k(scores_BTE, self.active)[1]
        return shard_local(top_k, jax.lax.stop_gradient(scores_BTE + self.bias[...]))


class HashRouter(Router):
    """Reads the experts of each token id from a fixed table. Such a layer has no balance loss."""

    has_balance_loss = False

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        super().__init__(model, rngs)
        moe = model.moe
        table = hash_table(model.vocab_size, moe.n_routed_experts, moe.num_experts_per_tok)
        self.table = Buffer(table, letters="VK")

    def choose(self, scores_BTE: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """Return the table's rows of the token ids."""
        return self.table[...][tokens_BT]


def hash_table(vocab: int, experts: int, active: int) -> jax.Array:
    """Return a fixed table of `active` distinct experts per token id, spread evenly, int32 [V, K].

    How the released tables were made is unpublished (spec 3.1). In this table the experts of an id are an arithmetic
    sequence modulo E whose start and step come from the mixed bits of the id; (K - 1) steps stay below E.
    """
    mixed_V1 = (jnp.arange(vocab, dtype=jnp.uint32)[:, None] + 1) * jnp.uint32(2_654_435_761)  # Knuth's multiplier
    start, step = (mixed_V1 >> 16) % experts, 1 + (mixed_V1 & 0xFFFF) % (experts // active)
    return ((start + step * jnp.arange(active, dtype=jnp.uint32)) % experts).astype(jnp.int32)


def balance_loss(
    scores_BTE: jax.Array, picks_BTK: jax.Array, valid_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the sequence-wise balance loss, mean over rows, and tokens per expert load_E, float32 (spec 3.3).

    The loss of a row is sum_e f_e P_e with f_e = E / (K S) #{t: e in picks(t)} and P_e = mean_t s_e / sum s. S is the
    number of valid tokens (`ForwardBatch.valid_BT`; None: all). The gradient passes through P alone.
    """
    E, K = scores_BTE.shape[-1], picks_BTK.shape[-1]
    chosen_BTE = jax.nn.one_hot(picks_BTK, E, dtype=jnp.float32).sum(2)
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True)
    weight_BT1 = jnp.ones((*scores_BTE.shape[:2], 1)) if valid_BT is None else valid_BT[..., None].astype(jnp.float32)
    tokens_B1 = jnp.maximum(weight_BT1.sum(1), 1)
    fraction_BE = (chosen_BTE * weight_BT1).sum(1) * E / (K * tokens_B1)
    mean_BE = (share_BTE * weight_BT1).sum(1) / tokens_B1
    return jnp.mean(jnp.sum(jax.lax.stop_gradient(fraction_BE) * mean_BE, -1)), (chosen_BTE * weight_BT1).sum((0, 1))
