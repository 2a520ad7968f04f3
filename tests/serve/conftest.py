"""A small random model that compresses both ways (each layer has a window too), and its forward without cache.

All tests here share one shape of model and few shapes of batches, because compiling them is what takes the time.
"""

import jax
import numpy as np
import pytest
from flax import nnx

from v4jax import config
from v4jax.data.tokenizer import Tokenizer
from v4jax.models.transformer import Transformer

MODEL = config.Model(
    vocab_size=2048, hidden_size=32, schedule=("csa", "hca"), heads=2, head_dim=16, rope_dim=8, q_rank=16,
    o_groups=1, o_rank=16, window=8, csa_ratio=4, hca_ratio=8, max_positions=4096, mtp_layers=0, init_std=0.3,
    dtype="float32", indexer=config.Indexer(heads=16, head_dim=8, topk=4),
    moe=config.Moe(experts=4, active=2, inner=16, hash_layers=1), mhc=config.HyperConnection(streams=2),
)  # fmt: skip
ROOM = 64  # tokens of the reference's one shape; later tokens do not reach earlier logits


@pytest.fixture(scope="session")
def model():
    """Drawn with numpy: JAX would compile a program a shape to draw it."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Transformer(MODEL, nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(leaf):
        if np.issubdtype(leaf.dtype, np.integer):  # distinct experts of every token
            return np.argsort(rng.random((leaf.shape[0], MODEL.moe.experts)))[:, : leaf.shape[1]].astype(np.int32)
        mean, std = (0, MODEL.init_std) if len(leaf.shape) > 1 else (1, 0.1)
        return rng.normal(mean, std, leaf.shape).astype(np.float32)

    return nnx.merge(graphdef, jax.device_put(jax.tree.map(draw, abstract)))


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer()


@pytest.fixture(scope="session")
def full_logits(model):
    """Token ids -> float32 logits [T, V] by one call without state."""

    def run(ids):
        padded = np.zeros((1, ROOM), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(model(padded))[0, : len(ids)]

    return run
