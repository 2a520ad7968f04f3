"""Mixture of experts: routed experts plus one shared expert (spec 3)."""

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax import config
from v4jax.kernels import fp8_dot
from v4jax.kernels.grouped_mlp import experts, swiglu
from v4jax.nn import qdq
from v4jax.nn.expert_parallel import ep_experts
from v4jax.nn.kv_cache_interface import ForwardBatch
from v4jax.nn.linear import einsum, is_fp8, is_mxfp4, normal_param
from v4jax.nn.router import Router, balance_loss
from v4jax.parallel.rules import current_rules


class ExpertWeights(nnx.Module):
    """Weights of E expert networks, or of a single one.

    Routed experts store gate and up as separate matrices, "EUDF". In the layout "EDUF" a TPU would copy all of them for
    each matmul. A single expert stores them as "DUF", so that one matmul computes both.
    """

    def __init__(self, model: config.Model, inner: int, count: int | None, rngs: nnx.Rngs):
        D, std = model.hidden_size, model.initializer_range
        if count is None:
            self.gate_up = normal_param(rngs, "DUF", (D, 2, inner), std)
            self.down = normal_param(rngs, "FD", (inner, D), std)
        else:
            self.gate_up = normal_param(rngs, "EUDF", (count, 2, D, inner), std)
            self.down = normal_param(rngs, "EFD", (count, inner, D), std)

    def matrices(self) -> tuple[jax.Array, jax.Array]:
        """Return gate_up_EUDF and down_EFD as the routed experts use them, rounded if training asks for it."""
        both = self.gate_up[...], self.down[...]
        if is_mxfp4(self.gate_up):
            both = map(qdq.mxfp4, both)
        if is_fp8(self.gate_up):  # exact for FP4 values if scales within a block differ by up to 2^14 (spec 8.4)
            one = lambda w_DF: fp8_dot.round_weights(w_DF[:, None])[:, 0]
            both = (jax.vmap(one)(w.reshape(-1, *w.shape[-2:])).reshape(w.shape) for w in both)
        return tuple(both)


class MoE(nnx.Module):
    """The feed-forward sublayer of a layer whose experts a `router` chooses."""

    def __init__(self, router: type[Router], model: config.Model, rngs: nnx.Rngs):
        moe = model.moe
        self.limit, self.dtype = moe.swiglu_limit, jnp.dtype(model.dtype)
        self.router = router(model, rngs)
        self.experts = ExpertWeights(model, moe.moe_intermediate_size, moe.n_routed_experts, rngs)
        self.shared = ExpertWeights(model, moe.moe_intermediate_size * moe.n_shared_experts, None, rngs)

    def __call__(self, x_BTD: jax.Array, chunk: ForwardBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Apply the experts.

        Args:
            x_BTD: inputs of the layer.
            chunk: the tokens; those that `chunk.valid_BT` leaves out go to no routed expert and are not counted.

        Returns:
            y_BTD, the balance loss (float32 scalar, 0 if the router has none) and the number of valid tokens of each
            expert, float32 [E].
        """
        picks_BTK, weights_BTK, scores_BTE = self.router(x_BTD, chunk.tokens_BT)
        matrices, fp8 = self.experts.matrices(), is_fp8(self.experts.gate_up)
        taken_BTK, valid_BT = picks_BTK, chunk.valid_BT
        if valid_BT is not None:
            taken_BTK = jnp.where(valid_BT[..., None], picks_BTK, scores_BTE.shape[-1])  # E is no expert
        if (sharding := current_rules()) is not None:
            routed = ep_experts(sharding, x_BTD, taken_BTK, weights_BTK, *matrices, self.limit, fp8)
        else:
            flat = lambda a: a.reshape(-1, a.shape[-1])
            routed = experts(flat(x_BTD), flat(taken_BTK), flat(weights_BTK), *matrices, limit=self.limit, fp8=fp8)
            routed = routed.reshape(x_BTD.shape)
        if valid_BT is not None:
            routed = jnp.where(valid_BT[..., None], routed, 0)
        h = swiglu(einsum("BTD,DUF->BTUF", x_BTD, self.shared.gate_up, self.dtype), self.limit).astype(self.dtype)
        shared = einsum("BTF,FD->BTD", h, self.shared.down, self.dtype)
        y_BTD = (routed + shared.astype(jnp.float32)).astype(x_BTD.dtype)
        balance, load_E = balance_loss(scores_BTE, picks_BTK, valid_BT)
        return y_BTD, balance if self.router.has_balance_loss else jnp.zeros_like(balance), load_E
