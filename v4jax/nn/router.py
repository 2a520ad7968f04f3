"""Routing of tokens to experts (spec 3.1): sqrt-softplus scores, and top-k with a bias or a table by token id."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.nn.linear import Buffer, normal_param
from v4jax.parallel.context_parallel import shard_local


class Router(nnx.Module):
    """Scores of all experts and the K experts of each token; `hashed` layers read the latter from a table."""

    def __init__(self, model: config.Model, hashed: bool, rngs: nnx.Rngs):
        moe = model.moe
        self.active, self.scale, self.hashed = moe.num_experts_per_tok, moe.routed_scaling_factor, hashed
        self.weight = normal_param(rngs, "DE", (model.hidden_size, moe.n_routed_experts), model.initializer_range)
        if hashed:
            self.table = Buffer(
                hash_table(model.vocab_size, moe.n_routed_experts, moe.num_experts_per_tok), letters="VK"
            )
        else:
            self.bias = Buffer(jnp.zeros(moe.n_routed_experts, jnp.float32), letters="E")

    def __call__(self, x_BTD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the experts picks_BTK (int32), their weights_BTK and all scores_BTE (float32).

        The bias changes the choice of experts only, never their weights.
        """
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), self.weight[...].astype(jnp.float32))
        # Below -87 softplus underflows to 0, where the gradient of the square root is NaN.
        scores_BTE = jnp.sqrt(jax.nn.softplus(jnp.maximum(logits_BTE, -80.0)))
        if self.hashed:
            picks_BTK = self.table[...][tokens_BT]
        else:
            # Run top-k on local tokens. Otherwise XLA:CPU gathers the scores of all rows on every device.
            choose = lambda scores_BTE: jax.lax.top_k(scores_BTE, self.active)[1]
            picks_BTK = shard_local(choose, jax.lax.stop_gradient(scores_BTE + self.bias[...]))
        chosen_BTK = jnp.take_along_axis(scores_BTE, picks_BTK, axis=-1)
        weights_BTK = self.scale * chosen_BTK / (chosen_BTK.sum(-1, keepdims=True) + 1e-20)
        return picks_BTK, weights_BTK, scores_BTE


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
    number of valid tokens. The gradient passes through P alone.
    """
    E, K = scores_BTE.shape[-1], picks_BTK.shape[-1]
    chosen_BTE = jax.nn.one_hot(picks_BTK, E, dtype=jnp.float32).sum(2)
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True)
    weight_BT1 = jnp.ones((*scores_BTE.shape[:2], 1)) if valid_BT is None else valid_BT[..., None].astype(jnp.float32)
    tokens_B1 = jnp.maximum(weight_BT1.sum(1), 1)
    fraction_BE = (chosen_BTE * weight_BT1).sum(1) * E / (K * tokens_B1)
    mean_BE = (share_BTE * weight_BT1).sum(1) / tokens_B1
    return jnp.mean(jnp.sum(jax.lax.stop_gradient(fraction_BE) * mean_BE, -1)), (chosen_BTE * weight_BT1).sum((0, 1))
