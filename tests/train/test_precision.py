"""Training in FP8 and for FP4: how far losses move, what gradients see, and what an export keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import v4jax
from tests.train.conftest import micro_config, with_train
from v4jax.checkpoint.convert import convert
from v4jax.checkpoint.model_io import open_checkpoint
from v4jax.checkpoint.orbax import TrainCheckpointer
from v4jax.config import validate
from v4jax.core.errors import UserError
from v4jax.kernels import fp8_dot
from v4jax.nn import qdq
from v4jax.train.trainer import Trainer

pytestmark = pytest.mark.slow

STEPS, CLOSE = 20, 0.05  # nats by which FP8 and FP4 may move the loss of a step; it falls by more than 1
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def small(**train):
    """One CSA layer; experts of 32, as groups of FP4 have it."""
    config = micro_config("unused", steps=STEPS, **train)
    moe = dataclasses.replace(config.model.moe, moe_intermediate_size=32, num_hash_layers=0)
    model = dataclasses.replace(config.model, layer_types=("csa",), num_nextn_predict_layers=0, moe=moe)
    return dataclasses.replace(config, model=model)


def train(config):
    """Losses of the same 20 steps on rows that repeat a pattern, and the last state."""
    trainer, rng = Trainer(config, optax.adam(5e-3)), np.random.default_rng(0)  # Muon takes long to compile
    pattern = rng.integers(3, 300, 40)
    state, losses = trainer.init(), []
    for _ in range(STEPS):
        ids = np.stack([np.tile(np.roll(pattern, -rng.integers(40)), 2)[:34] for _ in range(2)]).astype(np.int32)
        batch = trainer.shard_batch(
            {
                "tokens_BT": ids[:, :32],
                "targets_BT": ids[:, 1:33],
                "targets2_BT": ids[:, 2:],
                "segments_BT": np.ones((2, 32), np.int32),
                "positions_BT": np.tile(np.arange(32, dtype=np.int32), (2, 1)),
            }
        )
        state, metrics = trainer.step(state, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses), trainer, state


def test_losses_in_fp8_with_fp4_experts_stay_near_those_of_float32_and_an_export_loses_nothing(tmp_path):
    plain, _, _ = train(small())
    config = small(matmul_precision="fp8", expert_weight_format="mxfp4")
    losses, trainer, state = train(config)
    assert plain[-1] < plain[0] - 1
    assert 0 < np.abs(losses - plain).max() < CLOSE
    with TrainCheckpointer(tmp_path / "run", config, None, keep=1) as store:
        store.save(STEPS, trainer.to_tree(state), {})
    convert(tmp_path / "run", tmp_path / "hf", dtype="bfloat16")
    master, exported = trainer.to_tree(state)["model"], open_checkpoint(tmp_path / "hf", "float32")[1]
    for name in ("gate_up", "down"):
        name = f"layers.0.ffn.experts.{name}"
        used = np.asarray(jax.jit(qdq.mxfp4)(master[name]))
        np.testing.assert_array_equal(exported[name], used)
        assert (used != np.asarray(master[name])).any()
    np.testing.assert_array_equal(v4jax.load(tmp_path / "run").stacks[0][0].ffn.experts.down[...], used)


def test_mxfp4_is_the_nearest_number_of_its_group_and_keeps_what_fits():
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(2, 64, 3)) * np.exp(rng.normal(0, 2, (2, 64, 3)))).astype(np.float32)
    rounded = jax.jit(qdq.mxfp4)
    got = np.asarray(rounded(w))
    for expert, group, column in np.ndindex(2, 2, 3):
        place = expert, slice(32 * group, 32 * group + 32), column
        scale = 2.0 ** np.ceil(np.log2(np.abs(w[place]).max() / 6))
        was, is_now = (np.abs(a[place]).astype(np.float64) / scale for a in (w, got))
        assert set(is_now) <= set(GRID) and (np.sign(w[place]) * got[place] >= 0).all()
        np.testing.assert_array_equal(np.abs(was - is_now), np.abs(was[:, None] - GRID).min(1))
    np.testing.assert_array_equal(rounded(got), got)
    np.testing.assert_array_equal(got.astype(ml_dtypes.bfloat16).astype(np.float32), got)


def test_gradients_pass_straight_through_fp4():
    w, dy = np.random.default_rng(0).normal(size=(2, 4, 64, 2)).astype(np.float32)
    got = jax.jit(lambda w, dy: jax.vjp(qdq.mxfp4, w)[1](dy)[0])(w, dy)
    np.testing.assert_array_equal(got, dy)


def test_fp8_blocks_hold_fp4_numbers_without_loss():
    """Spec 8.4: if the scales of the groups in a block differ by up to 2^14."""
    rng = np.random.default_rng(0)
    values = rng.choice([*GRID, *-GRID], (128, 1, 128))
    values[::32] = 6.0  # every group has its largest number
    scales = 2.0 ** rng.integers(-7, 8, (4, 1, 128)).repeat(32, 0)
    scales[0, 0, 0] = scales[1:32, 0, 0] = 2.0**7
    w = jnp.asarray(values * scales, jnp.float32)
    np.testing.assert_array_equal(jax.jit(qdq.mxfp4)(w[:, 0]), w[:, 0])
    np.testing.assert_array_equal(jax.jit(fp8_dot.round_weights)(w), w)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"matmul_precision": "fp4"}, "train.matmul_precision is 'fp4'; one of plain, fp8"),
        ({"expert_weight_format": "fp8"}, "train.expert_weight_format is 'fp8'; one of plain, mxfp4"),
    ],
)
def test_unknown_formats_are_named(change, complaint):
    with pytest.raises(UserError, match=complaint):
        validate(small(**change))
    with pytest.raises(UserError, match="groups of 32, and model.moe.moe_intermediate_size is 16"):
        validate(with_train(micro_config("unused"), expert_weight_format="mxfp4"))
