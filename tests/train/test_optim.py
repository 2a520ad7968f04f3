"""Muon and AdamW follow spec 8.1."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.conftest import micro_config
from v4jax.config import Train
from v4jax.train.optim import MATRICES, make_optimizer, schedule, update_bias
from v4jax.train.trainer import Trainer

TRAIN = Train(steps=100, warmup=0, lr=1.0, adam_lr=1.0, weight_decay=0.0, clip_norm=1e9, final_lr=1.0)


def first_update(letters: str, shape: tuple[int, ...], train: Train = TRAIN, seed: int = 0) -> np.ndarray:
    """What one step adds to a parameter of zeros with a random gradient."""
    optimizer = make_optimizer(train, {"p": letters})
    params = {"p": jnp.zeros(shape)}
    grads = {"p": jax.random.normal(jax.random.key(seed), shape)}
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    return np.asarray(updates["p"])


@pytest.mark.parametrize(
    "letters, shape", [("DQ", (48, 16)), ("QNH", (16, 4, 8)), ("GRD", (2, 8, 40)), ("MXD", (24, 4, 16))]
)
def test_muon_orthogonalizes_whole_matrices(letters, shape):
    update = first_update(letters, shape)
    inputs, outputs = MATRICES[letters]
    order = [letters.index(letter) for letter in inputs + outputs]
    rows = int(np.prod([shape[letters.index(letter)] for letter in inputs]))
    matrix = update.transpose(order).reshape(rows, -1) / (0.18 * np.sqrt(max(rows, update.size // rows)))
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(values, 1.0, atol=5e-3)  # 8 + 2 steps; five plain ones leave 0.68 .. 1.13


def muon_by_the_rule(weight: np.ndarray, gradients: list[np.ndarray], train: Train) -> list[np.ndarray]:
    """Spec 8.1 in float64, line by line: the matrix after each step."""
    momentum, after = np.zeros_like(weight, np.float64), []
    weight = weight.astype(np.float64)
    for gradient in gradients:
        momentum = train.momentum * momentum + gradient
        x = train.momentum * momentum + gradient
        x = x / np.linalg.norm(x)
        for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2:
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        update = x * np.sqrt(max(x.shape)) * 0.18
        weight = weight * (1 - train.lr * train.weight_decay) - train.lr * update
        after.append(weight)
    return after


@pytest.mark.parametrize("letters, shape", [("DQ", (12, 20)), ("DE", (20, 12))])
def test_muon_steps_equal_the_rule_in_float64(letters, shape):
    """The first steps above all: with bias-corrected momentum they are off by up to 9 %, after 40 steps by 0.2 %."""
    train = dataclasses.replace(TRAIN, lr=0.05, weight_decay=0.1)
    optimizer, rng = make_optimizer(train, {"p": letters}), np.random.default_rng(0)
    start, *gradients = rng.normal(size=(9, *shape)).astype(np.float32)
    params, state = {"p": jnp.asarray(start)}, optimizer.init({"p": jnp.asarray(start)})
    before = start
    for gradient, want in zip(gradients, muon_by_the_rule(start, gradients, train), strict=True):
        updates, state = jax.jit(optimizer.update)({"p": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        got = np.asarray(params["p"])
        assert np.abs(got - want).max() < 1e-3 * np.abs(want - before).max()
        before = want


def test_muon_of_a_small_gradient_is_that_of_a_large_one():
    """The rule divides by the norm whatever it is; a matrix without a gradient has no update."""
    optimizer = make_optimizer(TRAIN, {"p": "DQ"})
    params, gradient = {"p": jnp.zeros((16, 8))}, jax.random.normal(jax.random.key(0), (16, 8))
    update = lambda g: optimizer.update({"p": g}, optimizer.init(params), params)[0]["p"]
    np.testing.assert_allclose(update(1e-12 * gradient), update(gradient), atol=1e-4)
    np.testing.assert_array_equal(update(jnp.zeros((16, 8))), 0)


@pytest.mark.parametrize(
    "letters, shape", [("EUDF", (3, 2, 16, 8)), ("EFD", (3, 8, 16)), ("GIR", (2, 16, 8)), ("DUF", (16, 2, 8))]
)
def test_each_expert_half_and_group_is_a_matrix_of_its_own(letters, shape):
    update = first_update(letters, shape)
    inputs, outputs = MATRICES[letters]
    batch = [i for i, letter in enumerate(letters) if letter not in inputs + outputs]
    matrices = np.moveaxis(update, batch, range(len(batch))).reshape(
        -1, shape[letters.index(inputs)], shape[letters.index(outputs)]
    )
    for matrix in matrices:
        assert np.sqrt(np.mean(matrix**2)) == pytest.approx(
            0.18 * np.sqrt(max(matrix.shape) * min(matrix.shape) / matrix.size), rel=1e-2
        )
        values = np.linalg.svd(matrix, compute_uv=False) / (0.18 * np.sqrt(max(matrix.shape)))
        np.testing.assert_allclose(values, 1.0, atol=5e-3)


def test_stacked_layers_get_the_update_of_single_ones():
    stacked = first_update("DQ", (3, 16, 8))
    grads = jax.random.normal(jax.random.key(0), (3, 16, 8))
    optimizer = make_optimizer(TRAIN, {"p": "DQ"})
    for layer in range(3):
        params = {"p": jnp.zeros((16, 8))}
        updates, _ = jax.jit(optimizer.update)({"p": grads[layer]}, optimizer.init(params), params)
        np.testing.assert_allclose(updates["p"], stacked[layer], atol=1e-5)


def test_other_parameters_follow_adamw():
    got = first_update("D", (16,))
    adamw = optax.adamw(1.0, b1=0.9, b2=0.95, eps=1e-20, weight_decay=0.0)
    params, grads = jnp.zeros(16), jax.random.normal(jax.random.key(0), (16,))
    np.testing.assert_allclose(got, adamw.update(grads, adamw.init(params), params)[0], rtol=1e-6)


def test_every_parameter_of_a_model_has_its_optimizer():
    trainer = Trainer(micro_config("unused"))
    state = jax.eval_shape(trainer.init)
    muon = {
        name for name, leaf in state.opt[1].inner_states["muon"].inner_state[0].trace.items() if hasattr(leaf, "shape")
    }
    vectors = {"scale", "base", "sink", "ape", "table"} | {"head.weight"}
    for name, leaf in state.params.items():
        is_vector = name.split(".")[-1] in vectors or name in vectors
        assert (name in muon) != is_vector, name
        assert leaf.dtype == jnp.float32


def test_decay_shrinks_by_lr_times_decay():
    optimizer = make_optimizer(Train(steps=10, warmup=0, lr=0.5, weight_decay=0.1, final_lr=1.0), {"p": "DQ"})
    params = {"p": jnp.ones((8, 4))}
    updates, _ = optimizer.update({"p": jnp.zeros((8, 4))}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["p"], -0.05, rtol=1e-5)


def test_schedule_warms_up_and_ends_at_its_fraction():
    rate = schedule(Train(steps=100, warmup=10, final_lr=0.1), 2.0)
    assert float(rate(0)) == 0 and float(rate(10)) == pytest.approx(2.0) and float(rate(100)) == pytest.approx(0.2)
    assert float(rate(5)) == pytest.approx(1.0)


def test_bias_moves_towards_the_mean_load():
    bias = update_bias(jnp.zeros((2, 3)), jnp.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]), 0.001)
    np.testing.assert_allclose(bias, [[0.001, 0.0, -0.001], [0.0, 0.0, 0.0]], atol=1e-9)
