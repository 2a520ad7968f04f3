"""A tiny model of every layer kind and random tensors for it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tests.micro_model import micro
from v4jax.checkpoint import model_io, param_mapping
from v4jax.config import Indexer, Model, MoE, RoPE
from v4jax.models.layer_stacks import from_layer_dict
from v4jax.models.transformer import Transformer


@pytest.fixture
def tiny() -> Model:
    """The tiny config of spec 12.1: the micro model with more layers and heads, and YaRN."""
    return micro(
        vocab_size=128,
        hidden_size=64,
        layer_types=("swa", "csa", "hca", "csa", "hca"),
        num_attention_heads=4,
        head_dim=32,
        q_lora_rank=24,
        o_lora_rank=16,
        compress_rate_hca=16,
        dtype="bfloat16",
        max_position_embeddings=512,
        rope=RoPE(yarn_factor=8.0, yarn_original=64),
        indexer=Indexer(index_n_heads=16, index_head_dim=16, index_topk=3),
        moe=MoE(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, num_hash_layers=1),
    )


@pytest.fixture
def random_flat():
    """Function (model, matrix dtype) -> flat tensors of random bits' worth: normal numbers, f32 where required."""

    def make(model: Model, dtype) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        flat = {}
        for name, tensor in param_mapping.tensors(model).items():
            if tensor.role == "index":
                flat[name] = rng.integers(0, model.moe.n_routed_experts, tensor.shape).astype(np.int32)
            else:
                kind = np.float32 if tensor.role == "f32" else dtype
                flat[name] = rng.standard_normal(tensor.shape, np.float32).astype(kind)
        return flat

    return make


@pytest.fixture
def build():
    """Function (model, flat tensors, scan) -> a Transformer that holds them."""

    def make(model: Model, flat, scan: bool = False) -> Transformer:
        graphdef, abstract, runs = model_io.abstract_model(model, scan)
        return nnx.merge(graphdef, from_layer_dict(jax.tree.map(jnp.asarray, flat), abstract, runs))

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
