"""Attention over a subset of the keys in the operand order that XLA:CPU computes fastest."""

import jax.numpy as jnp

from v4jax.kernels.attention import xla
from v4jax.kernels.tuning import tuned


def attend(q_BTNH, keys, mask_BTS):
    """See `api.attend`.

    For the few queries of a decode step, keys are the left matmul operand: XLA:CPU would transpose them first as the
    right operand.
    """
    if q_BTNH.shape[1] > tuned("attention", q_BTNH)["max_decode_queries"]:
        return xla.attend(q_BTNH, keys, mask_BTS)
    letters, keys = xla.key_letters(keys), keys.astype(q_BTNH.dtype)
    out = "BSTN" if keys.ndim == 3 else "BTSN"
    dots = jnp.einsum(f"{letters},BTNH->{out}", keys, q_BTNH, preferred_element_type=jnp.float32)
    return xla.partial_softmax(jnp.moveaxis(dots, out.index("S"), -1), keys, mask_BTS)


def attend_topk(q_BTNH, entries, picks_BTK):
    """See `api.attend_topk`."""
    return xla.attend_topk(q_BTNH, entries, picks_BTK, attend=attend)
