"""What devices send each other where the tokens of a row are split: boundary rows and entries, never whole rows."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.parallel.test_training import small
from v4jax.config import Mesh
from v4jax.core.errors import UserError
from v4jax.tools.aot import collective_bytes
from v4jax.train.trainer import Trainer

pytestmark = pytest.mark.slow

TOKENS, PARTS = 256, 8


def config(*kinds: str, tokens: int = TOKENS):
    """Layers whose weights are whole on every device, so that nothing but tokens' numbers moves."""
    found = small(Mesh("pod", context=PARTS))
    model = dataclasses.replace(found.model, layer_types=kinds)
    return dataclasses.replace(found, model=model, data=dataclasses.replace(found.data, seq_len=tokens))


def compiled(found, gradients: bool) -> dict[str, float]:
    """Bytes of collectives of the loss, or of its gradients, of one device."""
    trainer = Trainer(found)
    row = jax.ShapeDtypeStruct((found.train.batch_size, found.data.seq_len), np.int32, sharding=trainer.batch_sharding)
    batch = dict.fromkeys(("tokens_BT", "targets_BT", "targets2_BT", "segments_BT", "positions_BT"), row)
    loss = lambda params, state, batch: trainer.model_loss(params, state.fixed, batch)[0]
    function = jax.grad(loss) if gradients else loss
    of = lambda state, batch: function(state.params, state, batch)
    run = trainer._jit(of, (trainer.state_sharding, trainer.batch_sharding), None)
    return collective_bytes(run.lower(trainer.abstract(), batch).compile().as_text())


def test_parts_exchange_boundary_rows_and_gather_compressed_entries():
    found = config("csa", "hca")
    m, B = found.model, found.train.batch_size
    sent = compiled(found, gradients=False)
    # Rows of both layers, and the position and the document of each row.
    window = 4 * B * m.sliding_window * (2 * m.head_dim + 2)
    # Of the window before: values and gates of both halves.
    before = 4 * B * m.compress_rate_csa * 4 * (m.head_dim + m.indexer.index_head_dim)
    assert sent["collective-permute"] == window + before + 4 * B  # and the document of the window before
    csa = (m.head_dim + m.indexer.index_head_dim + 1) / m.compress_rate_csa
    hca = (m.head_dim + 1) / m.compress_rate_hca
    assert sent["all-gather"] == 4 * B * TOKENS * (csa + hca)
    sums = sum(sent.values()) - sent["collective-permute"] - sent["all-gather"]
    assert sums < 4 * B * m.moe.n_routed_experts * 16


def test_gradients_go_the_same_ways_back():
    """And those of weights, each on every device for its own tokens, are summed."""
    found = config("csa")
    m, B = found.model, found.train.batch_size
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(Trainer(found).abstract().params))
    forward, sent = compiled(found, gradients=False), compiled(found, gradients=True)
    assert sent["collective-permute"] <= 2 * forward["collective-permute"]
    assert sent["all-gather"] <= 2 * forward["all-gather"]
    whole = 4 * B * TOKENS * m.hidden_size
    assert sum(sent.values()) - sent["collective-permute"] - sent["all-gather"] - weights < whole / 4


def test_parts_too_short_for_a_window_are_one_line():
    with pytest.raises(UserError, match="rows of 32 tokens do not fall into 8 parts: each must be a multiple of 8"):
        compiled(config("csa", "hca", tokens=32), gradients=False)
