"""Reference of the Sinkhorn projection: loops in numpy, in the dtype of the logits (spec 4.1)."""

import numpy as np


def sinkhorn(logits: np.ndarray, iters: int, eps: float) -> np.ndarray:
    """Project one matrix of logits to a doubly stochastic matrix.

    Rows are normalized by softmax, and `eps` is added. Then `iters` column and `iters - 1` row normalizations
    alternate, each with `eps` added to its divisor.

    Args:
        logits: [n, n], row j, column k.
        iters: number of column normalizations.
        eps: the term that keeps divisors positive.

    Returns:
        [n, n].
    """
    b = np.exp(logits - logits.max(axis=1, keepdims=True))
    b = b / b.sum(axis=1, keepdims=True) + eps
    b = b / (b.sum(axis=0, keepdims=True) + eps)
    for _ in range(iters - 1):
        b = b / (b.sum(axis=1, keepdims=True) + eps)
        b = b / (b.sum(axis=0, keepdims=True) + eps)
    return b
