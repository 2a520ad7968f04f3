"""The name table: shapes, inverses, and the counts of the released models."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from v4jax.checkpoint import model_io, param_mapping
from v4jax.config import Indexer, Model, MoE, load, preset_names
from v4jax.models.layer_stacks import to_layer_dict


def test_shapes_of_the_tiny_model(tiny):
    shapes = param_mapping.shapes(tiny)
    assert shapes["embed.table"] == (128, 64) and shapes["head.weight"] == (64, 128)
    assert shapes["head_mhc.fn"] == (4, 4, 64) and shapes["layers.0.attn_mhc.fn"] == (24, 4, 64)
    assert shapes["layers.0.attn.q_up"] == (24, 4, 32) and shapes["layers.0.attn.o_down"] == (2, 64, 16)
    assert shapes["layers.1.attn.compressor.kv"] == (64, 64) and shapes["layers.2.attn.compressor.kv"] == (64, 32)
    assert shapes["layers.1.attn.compressor.ape"] == (4, 64) and shapes["layers.2.attn.compressor.ape"] == (16, 32)
    assert shapes["layers.1.attn.indexer.q_up"] == (24, 16, 16)
    assert shapes["layers.0.ffn.router.table"] == (128, 2) and "layers.0.ffn.router.bias" not in shapes
    assert shapes["layers.1.ffn.experts.gate_up"] == (8, 2, 64, 32)
    assert shapes["mtp.0.block.ffn.router.bias"] == (8,) and "mtp.0.block.attn.compressor.kv" not in shapes
    assert "layers.0.attn.compressor.kv" not in shapes and "layers.2.attn.indexer.q_up" not in shapes


@pytest.mark.parametrize("shared", [0, 3, *preset_names()])
def test_shapes_are_those_of_the_model(tiny, shared):
    """Of every preset, and of the tiny model with none and with several shared experts."""
    if isinstance(shared, str):
        model = load(shared).model
    else:
        model = dataclasses.replace(tiny, moe=dataclasses.replace(tiny.moe, n_shared_experts=shared))
    _, abstract, runs = model_io.abstract_model(model, False)
    flat = jax.eval_shape(lambda tree: to_layer_dict(tree, runs), abstract)
    assert param_mapping.shapes(model) == {name: array.shape for name, array in flat.items()}


def test_every_spelling_is_exactly_invertible(tiny):
    rng = np.random.default_rng(0)
    for tensor in param_mapping.tensors(tiny).values():
        flat = rng.integers(0, 2**16, tensor.shape).astype(np.uint16)  # any bits, those of NaN included
        for spelling in range(tensor.spellings):
            back = np.zeros_like(flat)
            for piece in tensor.pieces(spelling):
                part = piece.to_hf(flat)
                assert part.shape == piece.shape
                piece.put(back, part)
            assert np.array_equal(back, flat), tensor.name


def test_layout_of_the_pieces(tiny):
    tensors = param_mapping.tensors(tiny)
    flat = np.arange(math.prod((8, 2, 64, 32)), dtype=np.int32).reshape(8, 2, 64, 32)
    pieces = {piece.name: piece.to_hf(flat) for piece in tensors["layers.3.ffn.experts.gate_up"].pieces()}
    assert len(pieces) == 16
    assert np.array_equal(pieces["layers.3.ffn.experts.5.w1.weight"], flat[5, 0].T)
    assert np.array_equal(pieces["layers.3.ffn.experts.5.w3.weight"], flat[5, 1].T)
    q_up = np.arange(24 * 4 * 32, dtype=np.int32).reshape(24, 4, 32)
    (piece,) = tensors["layers.0.attn.q_up"].pieces()
    assert piece.name == "layers.0.attn.wq_b.weight"
    assert np.array_equal(piece.to_hf(q_up), q_up.reshape(24, 128).T)
    o_down = np.arange(2 * 64 * 16, dtype=np.int32).reshape(2, 64, 16)
    (piece,) = tensors["layers.0.attn.o_down"].pieces()
    assert np.array_equal(piece.to_hf(o_down)[16 + 3], o_down[1, :, 3])
    fn = np.arange(24 * 4 * 64, dtype=np.int32).reshape(24, 4, 64)
    (piece,) = tensors["layers.0.ffn_mhc.fn"].pieces()
    assert np.array_equal(piece.to_hf(fn)[7], fn[7].reshape(-1))


def test_names_are_unique(tiny):
    names = [piece.name for tensor in param_mapping.tensors(tiny).values() for piece in tensor.pieces()]
    assert len(names) == len(set(names))


def test_backbone_of_flash_has_the_published_size():
    """Tensor shapes of spec 1.3 and the byte-verified parameter counts of spec 1.2."""
    flash = Model(
        layer_types=("swa", "swa") + ("csa", "hca") * 20 + ("csa",),
        num_nextn_predict_layers=0,
        indexer=Indexer(index_topk=512),
        moe=MoE(),
    )
    count = {}
    for name, tensor in param_mapping.tensors(flash).items():
        if tensor.role != "index":
            part = "experts" if ".experts." in name else "embed" if name == "embed.table" else "other"
            count[part] = count.get(part, 0) + math.prod(tensor.shape)
    assert round(count["experts"] / 1e9, 3) == 277.025 and round(count["embed"] / 1e9, 4) == 0.5295
    assert round(sum(count.values()) / 1e9, 2) == 284.33
