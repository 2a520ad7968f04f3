"""Makes the golden files from transformers: `python -m tests.golden logits`, in the root of the repository.

Each file holds token ids and the logits that transformers' `deepseek_v4` gives for them in float32, with the weights
of `weights.random_flat(model, SEED)`. They keep the parity checks alive where torch is not installed; make them anew
when a case of `weights.CASES` changes, and only then: `tests/golden/test_golden.py` tests whether they still hold.
"""

import pathlib

import numpy as np

from tests.golden import weights

SEED, ROWS = 11, 2


def path(name: str) -> pathlib.Path:
    """File of one case."""
    return pathlib.Path(__file__).with_name(f"{name}.npz")


def main() -> None:
    """Write every file."""
    from tests.parity import oracle

    for name, (model, length) in weights.CASES.items():
        ids = weights.tokens(model, (ROWS, length), seed=SEED)
        logits = oracle.logits(oracle.network(model, weights.random_flat(model, SEED)), ids)
        np.savez_compressed(path(name), tokens=ids, logits=logits)
        print(f"{path(name).name}: {path(name).stat().st_size / 1e3:.1f} kB, logit spread {logits.std():.3f}")
