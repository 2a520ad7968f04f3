"""The specification of the Sinkhorn projection, in loops over numpy float64 (spec 4.1)."""

import numpy as np


def sinkhorn(logits: np.ndarray, iters: int, eps: float) -> np.ndarray:
    """logits [n, n] (row j, column k) to a doubly stochastic matrix.

    Rows first by softmax, then `iters` column and `iters - 1` row normalisations in turn, each with `eps` added to
    its divisor.
    """
    b = np.exp(logits - logits.max(axis=1, keepdims=True))
    b = b / b.sum(axis=1, keepdims=True) + eps
    b = b / (b.sum(axis=0, keepdims=True) + eps)
    for _ in range(iters - 1):
        b = b / (b.sum(axis=1, keepdims=True) + eps)
        b = b / (b.sum(axis=0, keepdims=True) + eps)
    return b
