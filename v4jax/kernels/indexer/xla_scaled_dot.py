"""Top-k search that multiplies keys stored in e4m3 by XLA's block-scaled matmul, without dequantizing them.

Keys in another format are read dequantized and scored as in `xla.py`.
"""

import jax
import jax.numpy as jnp

from v4jax.core.qtensor import QTensor, scaled_dot
from v4jax.kernels.indexer import xla


def topk_search(q_BTJL, w_BTJ, read_keys, mask, **sizes) -> jax.Array:
    """See `api.topk_search`."""
    return xla.topk_search(q_BTJL, w_BTJ, read_keys, mask, score_pass=score, raw_fp8=True, **sizes)


def score(q_BTJL, w_BTJ, keys_BCL: jax.Array | QTensor) -> jax.Array:
    """Return `api.score`. Keys in e4m3 round the queries to e4m3 (`core.qtensor.scaled_dot`)."""
    if not isinstance(keys_BCL, QTensor):
        return xla.score(q_BTJL, w_BTJ, keys_BCL)
    B, T, J, L = q_BTJL.shape
    dots_BTJC = scaled_dot(q_BTJL.reshape(B, T * J, L), keys_BCL).reshape(B, T, J, -1)
    return jnp.einsum("BTJC,BTJ->BTC", jax.nn.relu(dots_BTJC), w_BTJ)
