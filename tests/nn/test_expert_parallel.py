"""Experts on a mesh: every token reaches its experts, however uneven the routing, and gradients are exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax import config
from v4jax.config import Mesh, ShardingRules
from v4jax.core.errors import UserError
from v4jax.kernels.grouped_mlp import experts
from v4jax.nn import expert_parallel
from v4jax.parallel import token_dispatch
from v4jax.parallel.rules import MeshRules, make_mesh_rules

pytestmark = pytest.mark.slow

B, T, D, E, F, K = 8, 8, 16, 8, 12, 2
MESHES = {
    "expert": Mesh("expert"),
    "expert, fsdp": Mesh("expert", fsdp=2),
    "tensor": Mesh("tensor", data=4),
    "all": Mesh("pod", expert=2, tensor=2),
}


def arguments(uneven: bool):
    """Tokens, weights, both matrices, picks; uneven: almost all tokens want the same two experts."""
    keys = jax.random.split(jax.random.key(0), 5)
    logits = jax.random.normal(keys[0], (B, T, E)) - (4.0 * jnp.arange(E) if uneven else 0.0)
    draw = lambda key, *shape: jax.random.normal(key, shape)
    picks = jax.lax.top_k(logits, K)[1]
    gate_up = draw(keys[3], E, D, 2, F).swapaxes(1, 2) * 0.3
    return draw(keys[1], B, T, D), jax.nn.softmax(draw(keys[2], B, T, K)), gate_up, draw(keys[4], E, F, D) * 0.3, picks


@functools.cache
def alone(uneven: bool):
    """Result and gradients of the reference on one device."""
    *dense, picks = arguments(uneven)

    def reference(x, w, gate_up, down):
        flat = lambda a: a.reshape(-1, a.shape[-1])
        return experts(flat(x), flat(picks), flat(w), gate_up, down, limit=1.0, impl="ref").reshape(x.shape)

    return jax.jit(lambda *a: (reference(*a), jax.vjp(reference, *a)[1](jnp.cos(a[0]))))(*dense)


@pytest.mark.parametrize("name, uneven", [("expert", False), ("tensor", False), ("expert, fsdp", True), ("all", True)])
def test_spread_experts_are_experts(name, uneven):
    sharding = make_mesh_rules(MESHES[name])
    *dense, picks = arguments(uneven)
    function = lambda x, w, g, d: expert_parallel.ep_experts(sharding, x, picks, w, g, d, 1.0)
    got = jax.jit(lambda *a: (function(*a), jax.vjp(function, *a)[1](jnp.cos(a[0]))))(*dense)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(alone(uneven)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_spread_experts_round_to_fp8_as_experts_do():
    """But for the routing weights, which apply after the second product here and before it there."""
    sharding = make_mesh_rules(MESHES["expert, fsdp"])
    *dense, picks = arguments(True)
    function = lambda x, w, g, d: expert_parallel.ep_experts(sharding, x, picks, w, g, d, 1.0, True)
    got = jax.jit(lambda *a: (function(*a), jax.vjp(function, *a)[1](jnp.cos(a[0]))))(*dense)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(alone(True)), strict=True):
        error = np.linalg.norm(one - other) / np.linalg.norm(other)  # of all: single numbers may cross the clamp
        assert 1e-3 < error < 0.15, error


def test_uneven_routing_takes_several_rounds():
    """Else the test above would not show that a full round drops nothing."""
    picks = arguments(True)[-1]
    here = np.bincount(np.asarray(picks).reshape(-1), minlength=E).reshape(4, 2).sum(1)
    assert here.max() > 2 * expert_parallel._CAPACITY_FACTOR * picks.size / 4


def test_tokens_of_nobody_stay():
    """All rows but the first are padding, which would all want the same experts: one round, whatever padding holds."""
    sharding = make_mesh_rules(MESHES["expert"])
    x, w, gate_up, down, picks = arguments(True)
    real_B11 = (jnp.arange(B) == 0)[:, None, None]
    picks, x = jnp.where(real_B11, arguments(False)[-1], E), jnp.where(real_B11, x, jnp.nan)
    rows, matrices = sharding.activation("BTD"), (sharding.weight("EUDF"), sharding.weight("EFD"))

    def one(x, w, gate_up, down, picks):
        rounds, _ = expert_parallel._dispatch_plan(sharding, lambda *a: a[0], picks, gate_up.shape[0])
        return expert_parallel._forward(sharding, 1.0, False, x, w, gate_up, down, picks), rounds

    mapped = jax.shard_map(
        one, mesh=sharding.mesh, in_specs=(rows, rows, *matrices, rows), out_specs=(rows, jax.P()), check_vma=False
    )
    y, rounds = jax.jit(mapped)(x, w, gate_up, down, picks)
    alone = experts(x[0], picks[0], w[0], gate_up, down, limit=1.0, impl="ref")
    np.testing.assert_allclose(y[0], alone, atol=2e-5)
    assert rounds == 1


@pytest.mark.parametrize(
    "layout, message",
    [
        (
            ShardingRules("mine", "data", weights=(("expert", ("tensor",)),), activations=(("batch", ("data",)),)),
            "'tensor' splits 'expert' and so must also split",
        ),
        (
            ShardingRules("mine", "data", weights=(("expert_mlp", ("data",)),), activations=(("batch", ("data",)),)),
            "'data' splits 'expert_mlp' and so must not split",
        ),
    ],
)
def test_layouts_that_tokens_cannot_follow_are_refused(layout, message):
    mesh = make_mesh_rules(Mesh("tensor", data=4)).mesh
    with pytest.raises(UserError, match=message):
        expert_parallel.validate_ep(MeshRules(mesh, layout))


def test_every_layout_of_configs_can_be_followed():
    for name in config.sharding_names():
        layout = config.load_sharding(name)
        mesh = make_mesh_rules(Mesh("pod", expert=2, tensor=2)).mesh
        expert_parallel.validate_ep(MeshRules(mesh, layout))


def ragged_by_the_book(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `lax.ragged_all_to_all` is documented to do, by gathering all and writing slice after slice."""
    me = jax.lax.axis_index(axis_name)
    operands, first, sizes, to = (
        jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    rows = jnp.arange(operand.shape[0])
    for source in range(operands.shape[0]):
        moved = (rows >= first[source, me]) & (rows < first[source, me] + sizes[source, me])
        place = jnp.where(moved, rows - first[source, me] + to[source, me], output.shape[0])
        output = output.at[place].set(operands[source], mode="drop")
    return output


def test_offsets_of_the_ragged_way_are_right(monkeypatch):
    """XLA:CPU has no ragged_all_to_all, so its documentation stands in; uneven routing, several rounds."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_the_book)
    monkeypatch.setattr(token_dispatch, "NO_RAGGED", set())
    sharding = make_mesh_rules(MESHES["expert, fsdp"])
    *dense, picks = arguments(True)
    got = jax.jit(lambda *a: expert_parallel.ep_experts(sharding, a[0], picks, *a[1:], 1.0))(*dense)
    np.testing.assert_allclose(got, alone(True)[0], atol=2e-5)
