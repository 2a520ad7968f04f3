"""Public entry of the expert products; picks an implementation by backend."""

import jax

from v4jax.core.qtensor import QTensor
from v4jax.kernels.experts import blocks, ragged, ref
from v4jax.kernels.experts.activation import swiglu
from v4jax.kernels.select import select

_IMPLEMENTATIONS = {"ref": ref.experts, "blocks": blocks.experts, "ragged": ragged.experts}
_BEST = {"cpu": "blocks", "tpu": "ragged", "gpu": "ragged"}


def experts(
    x_BD: jax.Array,
    picks_BK: jax.Array,
    weights_BK: jax.Array,
    gate_up_EDUF: jax.Array | QTensor,
    down_EFD: jax.Array | QTensor,
    *,
    limit: float,
    impl: str | None = None,
) -> jax.Array:
    """Each token through its K experts, none dropped: float32 [B, D].

    Args:
      x_BD: tokens (batch and token axes flattened into B).
      picks_BK: int32, distinct experts of each token; E stands for none, and what it gives is undefined.
      weights_BK: float32 routing weights, applied before the second product as in the released model (spec 3.2).
      gate_up_EDUF: both first matrices, gate first.
      down_EFD: second matrix.
      limit: clamp of the SwiGLU.
      impl: "ref", "blocks", "ragged", or None for the backend's best; "blocks" where the weights are in 8 bits, because
        it widens one expert at a time and never all of them.
    """
    if impl is None and isinstance(gate_up_EDUF, QTensor):
        impl = "blocks"
    return _IMPLEMENTATIONS[select(impl, _IMPLEMENTATIONS, _BEST, portable="ragged")](
        x_BD, picks_BK, weights_BK, gate_up_EDUF, down_EFD, limit=limit
    )


__all__ = ["experts", "swiglu"]
