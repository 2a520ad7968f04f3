"""Training on eight devices is training on one: losses, gradients and updates, for every layout."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest

from tests.micro_model import divisible
from tests.parallel.meshes import MESHES
from tests.train.conftest import micro_config
from v4jax import config as config_lib
from v4jax.config import Mesh
from v4jax.train.trainer import Trainer

pytestmark = pytest.mark.slow

STEPS = 10
FULL = "pod, rows split"  # this mesh trains all layer kinds, the others one CSA layer: compiling is all their time


def small(mesh: Mesh | None = None, full: bool = False, **train) -> config_lib.Config:
    """A model whose axes eight devices divide: a CSA layer, and if `full` also HCA, and a window layer in MTP."""
    config = micro_config("unused", **{"batch_size": 8, "steps": 20, "lr": 2e-3, "adam_lr": 2e-3, **train})
    model = divisible()
    if full:
        moe = dataclasses.replace(model.moe, num_hash_layers=1)
        model = divisible(layer_types=("csa", "hca"), num_nextn_predict_layers=1, moe=moe)
    return dataclasses.replace(config, model=model, mesh=mesh or Mesh())


def batches(config: config_lib.Config) -> list[dict[str, np.ndarray]]:
    """Random documents, some of them padded."""
    rng, (B, T) = np.random.default_rng(0), (config.train.batch_size, config.data.seq_len)
    out = []
    for _ in range(STEPS):
        ids = rng.integers(3, 300, (B, T + 2)).astype(np.int32)
        segments = np.ones((B, T), np.int32)
        segments[: B // 2, T // 2 :] = 2
        segments[0, -8:] = 0
        positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        positions[: B // 2, T // 2 :] -= T // 2
        targets, targets2 = ids[:, 1:-1].copy(), ids[:, 2:].copy()
        targets[segments == 0] = targets2[segments == 0] = -1
        out.append(
            {
                "tokens_BT": ids[:, :-2],
                "targets_BT": targets,
                "targets2_BT": targets2,
                "segments_BT": segments,
                "positions_BT": positions,
            }
        )
    return out


class Kept(NamedTuple):
    """State of `keeping`: the gradients of the last step, by parameter, so that they lie as the parameters do."""

    gradients: dict[str, jax.Array]


def keeping() -> optax.GradientTransformation:
    """Plain descent that remembers what it was given. Muon on a mesh is tested by the runs of several processes."""
    update = lambda updates, state, params=None: (jax.tree.map(lambda g: -0.1 * g, updates), Kept(updates))
    return optax.GradientTransformation(lambda params: Kept(optax.tree.zeros_like(params)), update)


def run(trainer: Trainer, state=None):
    """Gradients of the first step, metrics of all, the parameters after the last, and the state that all began with."""
    rows = batches(trainer.config)
    start = jax.device_get(trainer.init() if state is None else state)
    state = jax.device_put(start, trainer.state_sharding)
    step = trainer.step.lower(state, trainer.shard_batch(rows[0])).compile()
    first, metrics = None, []
    for batch in rows:
        state, values = step(state, trainer.shard_batch(batch))
        first = jax.device_get(state.opt.gradients) if first is None else first
        metrics.append(values)
    return first, jax.device_get(metrics), jax.device_get(state.params), start


@functools.cache
def alone(full: bool):
    return run(Trainer(small(full=full), keeping()))


def test_every_layout_is_tested():
    assert {mesh.rules for mesh in MESHES.values()} == set(config_lib.sharding_names())


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_gives_the_losses_and_gradients_of_one_device(name):
    want_gradients, want_metrics, want_params, start = alone(name == FULL)
    gradients, metrics, params, _ = run(Trainer(small(MESHES[name], name == FULL), keeping()), start)
    for got, want in zip(metrics, want_metrics, strict=True):
        for key, value in want.items():
            np.testing.assert_allclose(got[key], value, rtol=1e-5, err_msg=key)
    for key, value in want_gradients.items():
        np.testing.assert_allclose(gradients[key], value, atol=1e-5 * max(1e-3, np.abs(value).max()), err_msg=key)
    for key, value in want_params.items():
        np.testing.assert_allclose(params[key], value, atol=1e-5, err_msg=key)
