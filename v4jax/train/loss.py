"""Training losses: next token, token after next (MTP), expert load balance, and the indexer's distance to attention."""

import jax
import jax.numpy as jnp

from v4jax import config
from v4jax.models.transformer import Transformer, full_batch
from v4jax.nn.kv_cache_interface import NoCache

Batch = dict[str, jax.Array]  # tokens_BT, targets_BT, targets2_BT, segments_BT, positions_BT (see data/packing.py)


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy summed over tokens.

    The target's logit is selected by a comparison, because the gradient of a gather would be a scatter into [B, T, V].

    Args:
      logits_BTV: Logits [B, T, V].
      targets_BT: int32 [B, T], token ids; negative targets are not counted.

    Returns:
      The sum of -log p in nats (float32 scalar), and the number of counted targets (int32 scalar).
    """
    is_target = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    target_logit_BT = jnp.sum(jnp.where(is_target, logits_BTV, 0.0), axis=-1)
    nll_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_logit_BT
    counted_BT = targets_BT >= 0
    return jnp.sum(jnp.where(counted_BT, nll_BT, 0.0)), counted_BT.sum()


def loss(model: Transformer, batch: Batch, train: config.Train) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of all losses (spec 3.3, 5.1, 8.3).

    Args:
      model: The model.
      batch: int32 arrays [B, T]; see `Batch`.
      train: Weights of the losses.

    Returns:
      The weighted sum (float32 scalar), and a dict of its unweighted terms "loss" and, with an MTP layer, "mtp" (nats
      per token), "balance" and "indexer" (float32 scalars), and of "load_E", the expert loads (float32 [layers, E]).
      The MTP layer's loads are the last row of "load_E", if that layer is trained.
    """
    chunk = full_batch(batch["tokens_BT"], batch["positions_BT"], batch["segments_BT"])
    x_BTXD, _, aux = model.forward_hidden(chunk, model.no_cache())
    nll, count = cross_entropy(model.logits(x_BTXD), batch["targets_BT"])
    parts = {"loss": nll / jnp.maximum(count, 1)}
    balance, loads = aux["balance"].sum(), aux["load_E"]
    if len(model.mtp) and train.mtp_loss_weight > 0:
        next_BT = jnp.maximum(batch["targets_BT"], 0)
        logits_BTV, _, _, mtp_aux = model.mtp_forward(x_BTXD, next_BT, chunk, NoCache())
        nll2, count2 = cross_entropy(logits_BTV, batch["targets2_BT"])
        parts["mtp"] = nll2 / jnp.maximum(count2, 1)
        balance, loads = balance + mtp_aux["balance"], jnp.concatenate([loads, mtp_aux["load_E"][None]])
    parts |= {"balance": balance, "indexer": aux["indexer"].sum()}
    weights = {
        "loss": 1.0,
        "mtp": train.mtp_loss_weight,
        "balance": train.balance_loss_weight,
        "indexer": train.indexer_loss_weight,
    }
    total = sum(weights[name] * value for name, value in parts.items() if weights[name])
    return jnp.asarray(total), parts | {"load_E": loads}


def heldout_nll(model: Transformer, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Next-token loss of a batch, without MTP: the sum in nats over its targets, and the number of targets."""
    chunk = full_batch(batch["tokens_BT"], batch["positions_BT"], batch["segments_BT"])
    x_BTXD, _, _ = model.forward_hidden(chunk, model.no_cache())
    return cross_entropy(model.logits(x_BTXD), batch["targets_BT"])
