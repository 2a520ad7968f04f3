"""Public API of the grouped expert MLP. It selects an implementation by platform."""

import jax

from v4jax.core.qtensor import QTensor
from v4jax.kernels.dispatch import select
from v4jax.kernels.fp8_dot import gradient_rows, round_rows
from v4jax.kernels.grouped_mlp import ref, xla_blocked, xla_ragged_dot

_IMPLEMENTATIONS = {"ref": ref.experts, "xla_blocked": xla_blocked.experts, "xla_ragged_dot": xla_ragged_dot.experts}
_PREFERRED = {"cpu": "xla_blocked"}


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
    """Pass each token through its K experts and return the weighted sum. No token is dropped (spec 3.2).

    Args:
        x_BD: tokens [B, D], with batch and token axes flattened into B.
        picks_BK: int32 [B, K], the top-k expert indices of each token, all distinct. Index E means no expert; its
            contribution is undefined.
        weights_BK: float32 [B, K], routing weights, applied before the second product as in the released model.
        gate_up_EUDF: gate and up matrices [E, 2, D, F], gate first.
        down_EFD: down matrices [E, F, D].
        limit: clamp of the SwiGLU.
        fp8: round the left operands of all products, forward and backward, in tiles of 1 x 128 along the hidden or
            inner size (spec 8.4; `kernels.fp8_dot`). The caller has rounded the matrices. The gradients of the matrices
            use the same tiles, because an expert has too few rows for tiles along the token axis.
        impl: "ref", "xla_blocked", "xla_ragged_dot", or None for the preferred one of the platform. With 8-bit weights
            None selects "xla_blocked", because it dequantizes one expert at a time instead of all.

    Returns:
        float32 [B, D].

    Raises:
        UserError: `impl` is unknown.
    """
    if impl is None and isinstance(gate_up_EUDF, QTensor):
        impl = "xla_blocked"
    operands = (x_BD, picks_BK, weights_BK, gate_up_EUDF, down_EFD)
    implementation = select(impl, _IMPLEMENTATIONS, _PREFERRED, portable="xla_ragged_dot", operands=operands)
    x_BD = round_rows(x_BD) if fp8 else x_BD
    y_BD = _IMPLEMENTATIONS[implementation](x_BD, *operands[1:], limit=limit, fp8=fp8)
    return gradient_rows(y_BD) if fp8 else y_BD
