"""Losses: what is counted, and where gradients go."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.conftest import with_train
from v4jax.train.loss import cross_entropy, loss
from v4jax.train.trainer import Trainer

pytestmark = pytest.mark.slow


def test_cross_entropy_equals_log_softmax_and_skips_missing_targets():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 11)) * 3
    targets = jnp.array([[1, 2, -1, 10, 0], [-1, -1, 3, 4, 5]])
    nll, count = cross_entropy(logits, targets)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    wanted = -sum(log_p[b, t, targets[b, t]] for b in range(2) for t in range(5) if targets[b, t] >= 0)
    assert int(count) == 7 and float(nll) == pytest.approx(wanted, rel=1e-6)


@pytest.fixture(scope="module")
def batch():
    """Two rows of two documents with padding at the end."""
    ids = np.random.default_rng(0).integers(3, 2048, (2, 34)).astype(np.int32)
    segments = np.repeat([[1, 2, 0]], [16, 8, 8], axis=1).repeat(2, 0).astype(np.int32)
    positions = np.concatenate([np.arange(16), np.arange(8), np.zeros(8)])[None].repeat(2, 0).astype(np.int32)
    targets, targets2 = np.where(segments > 0, ids[:, 1:33], -1), np.where(segments > 0, ids[:, 2:], -1)
    return {
        "tokens_BT": ids[:, :32],
        "targets_BT": targets,
        "targets2_BT": targets2,
        "segments_BT": segments,
        "positions_BT": positions,
    }


def gradients(config, *batches):
    """Return of each batch the largest gradient of every parameter."""
    trainer = Trainer(config)
    state = trainer.init()
    objective = lambda params, batch: loss(trainer.model(params, state.fixed), batch, config.train)[0]
    largest = jax.jit(
        lambda params, batch: jax.tree.map(lambda g: jnp.abs(g).max(), jax.grad(objective)(params, batch))
    )
    return [jax.device_get(largest(state.params, batch)) for batch in batches]


def of_kinds(config, *schedule, **changes):
    """Fewer layers compile sooner."""
    moe = dataclasses.replace(config.model.moe, num_hash_layers=0)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, layer_types=schedule, moe=moe, **changes)
    )


def test_indexer_learns_from_its_loss_alone(config, batch):
    config = of_kinds(config, "csa", num_nextn_predict_layers=0)
    [without] = gradients(with_train(config, indexer_loss_weight=0.0), batch)
    [only] = gradients(with_train(config, indexer_loss_weight=1.0, mtp_loss_weight=0.0, balance_loss_weight=0.0), batch)
    indexer = [name for name in without if ".indexer." in name]
    assert indexer and all(without[name] == 0 for name in indexer)
    assert all(only[name] > 0 for name in indexer)


def test_padding_changes_nothing(config, batch):
    trainer = Trainer(config)
    state = trainer.init()
    value = jax.jit(lambda b: loss(trainer.model(state.params, state.fixed), b, config.train))
    total, parts = value(batch)
    scrambled = batch | {"tokens_BT": np.where(batch["segments_BT"] == 0, 7, batch["tokens_BT"])}
    again, parts_again = value(scrambled)
    assert float(total) == pytest.approx(float(again), rel=1e-6)
    np.testing.assert_array_equal(parts["load_E"], parts_again["load_E"])
    assert float(parts["load_E"][0].sum()) == 2 * 24 * 2  # rows x real tokens x experts a token


def test_mtp_predicts_the_token_after_the_next(config, batch):
    """With the second targets masked, the MTP layer gets no gradient."""
    config = of_kinds(with_train(config, balance_loss_weight=0.0), "swa")
    none, some = gradients(config, batch | {"targets2_BT": np.full((2, 32), -1, np.int32)}, batch)
    assert none["mtp.0.hidden_proj"] == 0 and some["mtp.0.hidden_proj"] > 0
