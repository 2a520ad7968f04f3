"""A tiny model of every layer kind and random tensors for it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from v4jax.checkpoint import mapping, model_io
from v4jax.config import HyperConnection, Indexer, Model, Moe, Rope
from v4jax.models.layout import from_flat
from v4jax.models.transformer import Transformer


@pytest.fixture
def tiny() -> Model:
    """The tiny config of spec 12.1: all layer kinds, a hash layer, two output groups, YaRN, MTP."""
    return Model(
        vocab_size=128, hidden_size=64, schedule=("swa", "csa", "hca", "csa", "hca"), heads=4, head_dim=32, rope_dim=8,
        q_rank=24, o_groups=2, o_rank=16, window=8, csa_ratio=4, hca_ratio=16, max_positions=512, mtp_layers=1,
        rope=Rope(yarn_factor=8.0, yarn_original=64), indexer=Indexer(heads=16, head_dim=16, topk=3),
        moe=Moe(experts=8, active=2, inner=32, hash_layers=1), mhc=HyperConnection(),
    )  # fmt: skip


@pytest.fixture
def random_flat():
    """Function (model, matrix dtype) -> flat tensors of random bits' worth: normal numbers, f32 where required."""

    def make(model: Model, dtype) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        flat = {}
        for name, tensor in mapping.tensors(model).items():
            if tensor.role == "index":
                flat[name] = rng.integers(0, model.moe.experts, tensor.shape).astype(np.int32)
            else:
                kind = np.float32 if tensor.role == "f32" else dtype
                flat[name] = rng.standard_normal(tensor.shape, np.float32).astype(kind)
        return flat

    return make


@pytest.fixture
def build():
    """Function (model, flat tensors, scan) -> a Transformer that holds them."""

    def make(model: Model, flat, scan: bool = False) -> Transformer:
        graphdef, abstract, runs = model_io._structure(model, scan)
        return nnx.merge(graphdef, from_flat(jax.tree.map(jnp.asarray, flat), abstract, runs))

    return make


@pytest.fixture
def same_bits():
    """Function that asserts two mappings hold the same names, types, shapes and bits."""

    def check(left, right) -> None:
        assert list(left) == list(right)
        for name in left:
            a, b = np.asarray(left[name]), np.asarray(right[name])
            assert (a.dtype, a.shape) == (b.dtype, b.shape), name
            assert a.tobytes() == b.tobytes(), name

    return check


@pytest.fixture(params=["float32", "bfloat16"])
def weights(request) -> np.dtype:
    """Both weight formats."""
    return np.dtype({"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[request.param])
