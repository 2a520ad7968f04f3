"""Reference of the lightning indexer: float32, one head at a time (DeepSeek-V4 report, lightning indexer; spec 2.6)."""

import jax
import jax.numpy as jnp


def score(q_BTJL, w_BTJ, keys_BCL):
    """Return I[t, c] = sum_j w[t, j] relu(q[t, j] . k[c]), float32 [B, T, C]. See `api.score`."""
    q_BTJL, w_BTJ, keys_BCL = (a.astype(jnp.float32) for a in (q_BTJL, w_BTJ, keys_BCL))
    scores_BTC = jnp.zeros((*q_BTJL.shape[:2], keys_BCL.shape[1]), jnp.float32)
    for j in range(q_BTJL.shape[2]):
        dots_BTC = jnp.einsum("BTL,BCL->BTC", q_BTJL[:, :, j], keys_BCL, precision="highest")
        scores_BTC += w_BTJ[:, :, j, None] * jax.nn.relu(dots_BTC)
    return scores_BTC


def topk_search(q_BTJL, w_BTJ, read_keys, mask, *, num_entries, num_visible, k):
    """Sort all visible entries by falling score, equal scores by index. See `api.topk_search`."""
    scores_BTC = score(q_BTJL, w_BTJ, read_keys(jnp.int32(0), num_entries, False))
    seen_BTC = mask(jnp.int32(0), num_entries) & (jnp.arange(num_entries) < num_visible)
    order_BTC = jnp.argsort(jnp.where(seen_BTC, -scores_BTC, jnp.inf), axis=-1, stable=True).astype(jnp.int32)
    found_BTC = jnp.take_along_axis(seen_BTC, order_BTC, axis=-1)
    return jnp.where(found_BTC, order_BTC, -1)[..., :k]
