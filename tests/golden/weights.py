"""Random weights from a numpy seed, so that golden files need not store them, and the configs they are made for.

`RandomState` is numpy's frozen generator: its streams never change. Tensors are drawn in the order of the checkpoint
mapping, in the flat layout; the scales are those of spec 12.1, with larger gates, sinks and biases, for weights near
zero would leave them untested.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.micro_model import micro
from v4jax.checkpoint import param_mapping
from v4jax.config import HyperConnection, Indexer, Model, MoE, RoPE
from v4jax.models.layer_stacks import from_layer_dict
from v4jax.models.transformer import Transformer, continuation_batch, full_batch

# Axis of the inputs in the flat layout [in..., out...], where it is not the first one.
_FAN_IN = {
    "embed.table": (1,),
    "fn": (1, 2),
    "o_down": (1,),
    "o_up": (0, 1),
    "experts.gate_up": (2,),
    "experts.down": (1,),
}


def config(**changes) -> Model:
    """Return the micro model in the variant of the stored logits: without MTP, with YaRN and clamps within reach."""
    fields = dict(
        vocab_size=64,
        num_attention_heads=4,
        q_lora_rank=24,
        o_lora_rank=16,
        compress_rate_hca=16,
        num_nextn_predict_layers=0,
        rope=RoPE(yarn_factor=8.0, yarn_original=64),
        indexer=Indexer(index_n_heads=16, index_head_dim=16, index_topk=3),
        moe=MoE(
            n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, num_hash_layers=1, swiglu_limit=1.0
        ),
    )
    return micro(**fields | changes)


# Golden cases: a usual model, and one where what the first fixes differs (groups, ratios, YaRN off, odd window).
CASES = {
    "usual": (config(), 45),
    "other": (
        config(
            layer_types=("hca", "csa", "swa"),
            num_attention_heads=6,
            o_groups=1,
            sliding_window=5,
            compress_rate_hca=12,
            rope=RoPE(),
            indexer=Indexer(index_n_heads=24, index_head_dim=8, index_topk=2),
            mhc=HyperConnection(hc_mult=2, hc_sinkhorn_iters=5),
            moe=MoE(
                n_routed_experts=6,
                num_experts_per_tok=3,
                moe_intermediate_size=16,
                num_hash_layers=2,
                routed_scaling_factor=2.5,
                swiglu_limit=0.5,
            ),
        ),
        51,
    ),
}


def random_flat(model: Model, seed: int) -> dict[str, np.ndarray]:
    """Every flat tensor of a model: float32, hash tables int32 with distinct experts."""
    rng = np.random.RandomState(seed)
    flat = {}
    for name, tensor in param_mapping.tensors(model).items():
        normal = rng.standard_normal(tensor.shape)
        if tensor.role == "index":
            rows = [rng.permutation(model.moe.n_routed_experts)[: tensor.shape[1]] for _ in range(tensor.shape[0])]
            flat[name] = np.stack(rows).astype(np.int32)
            continue
        if tensor.role == "norm":
            normal = 1 + 0.1 * normal
        elif name.endswith(("sink", "ape")):
            pass
        elif name.endswith(("base", "scale", "bias")):
            normal = 0.3 * normal
        else:
            axes = next((axes for end, axes in _FAN_IN.items() if name.endswith(end)), (0,))
            normal = normal / np.sqrt(np.prod([tensor.shape[axis] for axis in axes]))
        flat[name] = normal.astype(np.float32)
    return flat


def build(model: Model, flat: dict[str, np.ndarray], scan: bool = False) -> Transformer:
    """A Transformer that holds the flat tensors."""
    shell = nnx.eval_shape(lambda: Transformer(model, nnx.Rngs(0), scan=scan))
    graphdef, abstract = nnx.split(shell)
    return nnx.merge(graphdef, from_layer_dict(jax.tree.map(jnp.asarray, flat), abstract, shell.stack_specs))


@jax.jit
def full(net: Transformer, tokens_BT):
    """The whole row at once: logits, streams after the last layer, losses and loads."""
    x_BTXD, _, aux = net.forward_hidden(full_batch(tokens_BT), net.no_cache())
    return net.logits(x_BTXD), x_BTXD, aux


@jax.jit
def step(net: Transformer, tokens_BT, start_B, count_B, state):
    """The next tokens of every row: logits, streams after the last layer, state."""
    x_BTXD, state, _ = net.forward_hidden(continuation_batch(tokens_BT, start_B, count_B), state)
    return net.logits(x_BTXD), x_BTXD, state


def tokens(model: Model, shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """Random token ids, int32."""
    return np.random.RandomState(seed).randint(0, model.vocab_size, shape).astype(np.int32)
