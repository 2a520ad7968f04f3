"""Weights in 8 bits for inference: which matrices, and their blocks (spec 8.4, 9).

The matrices that released checkpoints store in 8 or 4 bits become e4m3 with a power-of-two scale a block of 128 x 128;
embedding, head, router, compressors, indexer weights, norms, mHC and sinks stay. Products are computed in the model's
dtype, from numbers widened just before. Released weights lose nothing: FP8 blocks come back as they were stored, and
MXFP4 experts fit as long as the group scales of a block lie within 2^14 of each other.
"""

import jax
from flax import nnx

from v4jax.core.errors import UserError
from v4jax.core.qtensor import QTensor, quantize_blocks
from v4jax.models.transformer import Transformer
from v4jax.nn.linear import FP8_WEIGHT_AXES

QUANTIZATIONS = ("none", "fp8")
_STORED = FP8_WEIGHT_AXES | {"GIR"}  # the first output matrix is stored in FP8 as well, if not multiplied in it
_STACKING = "*EUG"  # letters of axes that stack matrices: repeated layers, experts, gate and up, output groups

_blocks = jax.jit(quantize_blocks, static_argnums=1)


def check_quantization(quantization: str) -> None:
    """Raise UserError for one that there is not."""
    if quantization not in QUANTIZATIONS:
        raise UserError(f"unknown quantization {quantization!r}; one of {', '.join(QUANTIZATIONS)}")


def quantize_weight(letters: str, array: jax.Array) -> jax.Array | QTensor:
    """A QTensor of the array, blocks along its input axis and its last, if its axes are those of a matrix in FP8."""
    if letters.lstrip("*") not in _STORED:
        return array
    return _blocks(array, (next(i for i, letter in enumerate(letters) if letter not in _STACKING), -1))


def quantize_model(model: Transformer) -> Transformer:
    """The model with those weights as QTensors; what is one already stays. The given model is left as it was."""
    graphdef, state = nnx.split(model)
    filled = {}
    for place, variable in nnx.to_flat_state(state):
        value = variable[...]
        if not isinstance(value, QTensor):
            stacked = "*" * (value.ndim - len(variable.letters))
            variable = variable.replace(quantize_weight(stacked + variable.letters, value))
        filled[place] = variable
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
