"""8-bit weights for inference: the choice of matrices and their blocks (spec 8.4, 9).

Matrices that released checkpoints store in 8 or 4 bits become e4m3 with one power-of-two scale per block of 128 x 128.
Embedding, head, router, compressors, indexer weights, norms, mHC and sinks keep their dtype. Products run in the
model's dtype: weights are dequantized just before. Released weights are represented exactly: FP8 blocks keep their
bits, and MXFP4 experts fit as long as the group scales of a block are within a factor of 2^14 of each other.
"""

import jax
from flax import nnx

from v4jax.core.config_limits import CHOICES
from v4jax.core.errors import UserError
from v4jax.core.qtensor import QTensor, quantize_blocks
from v4jax.models.transformer import Transformer
from v4jax.nn.linear import FP8_WEIGHT_AXES

QUANTIZATIONS = CHOICES["serve.quantization"]
_STORED = FP8_WEIGHT_AXES | {"GIR"}  # the first output matrix (wo_a) is stored in FP8 but not multiplied in FP8
_STACKING = "*EUG"  # letters of axes that stack matrices: repeated layers, experts, gate and up, output groups

_blocks = jax.jit(quantize_blocks, static_argnums=1)


def check_quantization(quantization: str) -> None:
    """Raise UserError if `quantization` is not in QUANTIZATIONS."""
    if quantization not in QUANTIZATIONS:
        raise UserError(f"unknown quantization {quantization!r}; one of {', '.join(QUANTIZATIONS)}")


def quantize_weight(letters: str, array: jax.Array) -> jax.Array | QTensor:
    """Quantize a weight if it is one of the matrices stored in FP8, else return it unchanged.

    Args:
        letters: axis letters of the weight, with "*" for each axis of stacked layers.
        array: the weight.

    Returns:
        A QTensor with blocks along the input axis and the last axis, or `array`.
    """
    if letters.lstrip("*") not in _STORED:
        return array
    return _blocks(array, (next(i for i, letter in enumerate(letters) if letter not in _STACKING), -1))


def quantize_model(model: Transformer) -> Transformer:
    """Return a copy of the model with quantized weights. Weights that are QTensors already stay as they are."""
    graphdef, state = nnx.split(model)
    filled = {}
    for place, variable in nnx.to_flat_state(state):
        value = variable[...]
        if not isinstance(value, QTensor):
            stacked = "*" * (value.ndim - len(variable.letters))
            variable = variable.replace(quantize_weight(stacked + variable.letters, value))
        filled[place] = variable
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
