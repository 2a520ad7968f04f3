"""Public entry of the expert products; picks an implementation by backend."""

import jax

from v4jax.core.qtensor import QTensor
from v4jax.kernels.dispatch import select
from v4jax.kernels.fp8_dot import gradient_rows, with_rows
from v4jax.kernels.grouped_mlp import ref, xla_blocked, xla_ragged_dot
from v4jax.kernels.grouped_mlp.swiglu import swiglu

_IMPLEMENTATIONS = {"ref": ref.experts, "blocks": xla_blocked.experts, "ragged": xla_ragged_dot.experts}
_BEST = {"cpu": "blocks", "tpu": "ragged", "gpu": "ragged"}


def experts(
    x_BD: jax.Array,
    picks_BK: jax.Array,
    weights_BK: jax.Array,
    gate_up_EUDF: jax.Array | QTensor,
    down_EFD: jax.Array | QTensor,
    *,
    limit: float,
    fp8: bool = False,
    impl: str | None = None,
) -> jax.Array:
    """Each token through its K experts, none dropped: float32 [B, D].

    Args:
      x_BD: tokens (batch and token axes flattened into B).
      picks_BK: int32, distinct experts of each token; E stands for none, and what it gives is undefined.
      weights_BK: float32 routing weights, applied before the second product as in the released model (spec 3.2).
      gate_up_EUDF: both first matrices, gate first.
      down_EFD: second matrix.
      limit: clamp of the SwiGLU.
      fp8: round what meets the matrices, forward and backward, in tiles of 1 x 128 along the hidden or inner size
        (spec 8.4; `kernels.fp8_dot`). The matrices come rounded. Their own gradients take the same tiles: the rows
        of an expert are too few to be tiled along.
      impl: "ref", "blocks", "ragged", or None for the backend's best; "blocks" where the weights are in 8 bits, because
        it widens one expert at a time and never all of them.
    """
    if impl is None and isinstance(gate_up_EUDF, QTensor):
        impl = "blocks"
    x_BD = with_rows(x_BD) if fp8 else x_BD
    y_BD = _IMPLEMENTATIONS[select(impl, _IMPLEMENTATIONS, _BEST, portable="ragged")](
        x_BD, picks_BK, weights_BK, gate_up_EUDF, down_EFD, limit=limit, fp8=fp8
    )
    return gradient_rows(y_BD) if fp8 else y_BD


__all__ = ["experts", "swiglu"]
