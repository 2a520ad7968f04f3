"""The step that a sharded engine would run gives each row what the engine's own program gives it on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from v4jax import config as config_lib
from v4jax.config import Mesh
from v4jax.core.errors import UserError
from v4jax.models.transformer import Transformer
from v4jax.serve import model_steps
from v4jax.tools import aot_steps
from v4jax.tools.cost_model import Workload

pytestmark = pytest.mark.slow

DEVICES, ROWS = 2, 2


@pytest.fixture(scope="module")
def tiny():
    config = config_lib.load("tiny")
    moe = dataclasses.replace(config.model.moe, num_hash_layers=0)
    model = dataclasses.replace(config.model, layer_types=("csa",), num_nextn_predict_layers=0, moe=moe)
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize("copies", [0, 2])
def test_rows_decode_as_on_one_device(tiny, copies):
    """copies: device entries, as a multiple of a step's top-k entries; 0 keeps all entries on the device."""
    hot = dataclasses.replace(tiny.cache, kv_device_entries=copies * ROWS * tiny.model.indexer.index_topk)
    work = Mesh("serve"), Workload("decode", 256, DEVICES * ROWS), jax.devices()[:DEVICES]
    step = aot_steps.serve(dataclasses.replace(tiny, cache=hot), *work)
    graphdef, variables = nnx.split(nnx.eval_shape(lambda: Transformer(tiny.model, nnx.Rngs(0))))
    weights, live, heads, (_, table) = step.arguments
    zeros = lambda tree: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)
    rng = np.random.default_rng(0)
    weights = [rng.normal(0, 0.1, a.shape).astype(a.dtype) for a in weights]
    token = rng.integers(0, tiny.model.vocab_size, heads.token_Z.shape).astype(np.int32)
    heads = heads._replace(token_Z=token, position_Z=np.zeros_like(token), draft_ZK=zeros(heads.draft_ZK))
    pages = np.where(np.arange(1 + ROWS) > 0, np.arange(1 + ROWS), -1).astype(np.int32)[:, None]  # a page a row
    assert table.shape == (DEVICES * (1 + ROWS), 1)
    rows = (np.tile(np.arange(1, 1 + ROWS, dtype=np.int32), DEVICES), np.tile(pages, (DEVICES, 1)))
    copy = lambda tree: jax.tree.map(jnp.array, tree)
    put = lambda tree, abstract: jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), copy(tree), abstract)
    structure, kept = model_steps.model_def(graphdef, jax.tree.structure(variables)), zeros(live)
    alone = zeros(aot_steps.serve(tiny, *work).arguments[1])
    part = lambda tree, i: jax.tree.map(lambda a: jnp.array(np.split(np.asarray(a), DEVICES)[i]), tree)
    own = [part(alone, i) for i in range(DEVICES)]
    kept, abstract = put(kept, live), step.arguments
    for position in range(5):  # a window of the compressor ends among them
        heads = heads._replace(position_Z=np.full_like(token, position), token_Z=(token * (position + 1)) % 2048)
        kept, _, logits = step.function(
            put(weights, abstract[0]), kept, put(heads, abstract[2]), put(rows, abstract[3])
        )
        expected = []
        for i in range(DEVICES):
            own[i], _, one = model_steps.decode(structure, weights, own[i], part(heads, i), part(rows, i), False)
            expected.append(one)
        np.testing.assert_allclose(logits, np.concatenate(expected), atol=1e-5)
    assert np.ptp(logits) > 0.01
    assert bool(copies) == any(leaf.sharding.memory_kind == "pinned_host" for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize(
    "mesh, rows, message",
    [
        (Mesh("serve"), 6, "6 rows cannot be split over 4"),
        (Mesh("serve", tensor=2), 8, "else over tensor"),
        (Mesh("expert"), 8, "splits more"),
    ],
)
def test_steps_that_cannot_be_are_one_line(tiny, mesh, rows, message):
    with pytest.raises(UserError, match=message):
        aot_steps.serve(tiny, mesh, Workload("decode", 256, rows), jax.devices()[:4])
