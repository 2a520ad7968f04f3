"""Routed experts on a mesh: tokens are dispatched to the devices of their experts, and none is dropped.

Every device sorts its (token, expert) rows by expert and dispatches them along the mesh axes that split the experts. It
computes the rows that it receives with its own experts and returns them. The source weights and sums them. The other
axes of an expert matrix may be split too. The hidden size may be split over axes that split the tokens: it is gathered
before use, and its gradient is reduce-scattered. The inner size may be split over axes that do not split the tokens:
the devices compute partial sums, which are added at the end.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from v4jax.core.errors import UserError
from v4jax.kernels.grouped_mlp import experts
from v4jax.parallel.rules import MeshRules
from v4jax.parallel.token_dispatch import TokenDispatcher

# Rows per round, relative to the number that a device receives if all experts have equal load. More rows need another
# round, which costs time but drops no token. The value is an estimate: one round is enough for routing that the balance
# rules hold within a third of the mean.
_CAPACITY_FACTOR = 1.5


def ep_experts(
    sharding: MeshRules,
    x_BTD: jax.Array,
    picks_BTK: jax.Array,
    weights_BTK: jax.Array,
    gate_up_EUDF: jax.Array,
    down_EFD: jax.Array,
    limit: float,
    fp8: bool = False,
) -> jax.Array:
    """Compute `kernels.grouped_mlp.experts` on arrays that `sharding` splits.

    If `sharding.per_device`, the arrays are the shards of one device, and the result has no gradient. An index that is
    no expert's stands for no expert, and its output is undefined. The routing weights multiply the combined rows, in
    float32.

    Returns:
        float32 [B, T, D].

    Raises:
        UserError: the sharding rules split the experts in a way that `validate_ep` refuses.
    """
    validate_ep(sharding)
    if sharding.per_device:
        return _forward(sharding, limit, fp8, x_BTD, weights_BTK, gate_up_EUDF, down_EFD, picks_BTK)
    return _routed(sharding, limit, fp8, x_BTD, weights_BTK, gate_up_EUDF, down_EFD, picks_BTK)


def validate_ep(sharding: MeshRules) -> None:
    """Raise UserError unless experts and hidden size are split along token axes and the inner size is not."""
    tokens = _token_axes(sharding)
    for name, inside in (("expert", True), ("expert_embed", True), ("expert_mlp", False)):
        for axis in sharding.axes("weights", name):
            if (axis in tokens) != inside:
                raise UserError(
                    f"sharding rules {sharding.rules.name!r}: mesh axis {axis!r} splits {name!r} and so must "
                    f"{'also' if inside else 'not'} split batch or token"
                )


def _token_axes(sharding: MeshRules) -> tuple[str, ...]:
    return sharding.axes("activations", "batch") + sharding.axes("activations", "token")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _routed(sharding, limit, fp8, x_BTD, weights_BTK, gate_up_EUDF, down_EFD, picks_BTK):
    rows, matrices = sharding.activation("BTD"), (sharding.weight("EUDF"), sharding.weight("EFD"))
    forward = functools.partial(_forward, sharding, limit, fp8)
    mapped = jax.shard_map(
        forward, mesh=sharding.mesh, in_specs=(rows, rows, *matrices, rows), out_specs=rows, check_vma=False
    )
    return mapped(x_BTD, weights_BTK, gate_up_EUDF, down_EFD, picks_BTK)


def _save(sharding, limit, fp8, *arguments):
    return _routed(sharding, limit, fp8, *arguments), arguments


def _gradients(sharding, limit, fp8, arguments, dy_BTD):
    rows, matrices = sharding.activation("BTD"), (sharding.weight("EUDF"), sharding.weight("EFD"))
    backward = functools.partial(_backward, sharding, limit, fp8)
    mapped = jax.shard_map(
        backward,
        mesh=sharding.mesh,
        in_specs=(rows, rows, *matrices, rows, rows),
        out_specs=(rows, rows, *matrices),
        check_vma=False,
    )
    return *mapped(*arguments, dy_BTD), None


_routed.defvjp(_save, _gradients)


def _forward(sharding, limit, fp8, x_BTD, weights_BTK, gate_up_EUDF, down_EFD, picks_BTK):
    """Run the experts on one device's tokens with its shard of the matrices (the shard_map body)."""
    products = functools.partial(experts, limit=limit, fp8=fp8)
    rounds, one = _dispatch_plan(sharding, products, picks_BTK, gate_up_EUDF.shape[0])
    arguments = (_flat(x_BTD), _flat(weights_BTK), *_gathered(sharding, x_BTD.dtype, gate_up_EUDF, down_EFD))
    first = one(jnp.int32(0), *arguments)  # outside the loop, so that it can overlap with independent work
    y_BD = jax.lax.fori_loop(1, rounds, lambda turn, y: y + one(turn, *arguments), first)
    return jax.lax.psum(y_BD, _width_axes(sharding)).reshape(x_BTD.shape)


def _backward(sharding, limit, fp8, x_BTD, weights_BTK, gate_up_EUDF, down_EFD, picks_BTK, dy_BTD):
    """Recompute each round with its gradients; those of a matrix are summed over the devices that used it."""
    products = functools.partial(experts, limit=limit, fp8=fp8)
    rounds, one = _dispatch_plan(sharding, products, picks_BTK, gate_up_EUDF.shape[0])
    arguments = (_flat(x_BTD), _flat(weights_BTK), *_gathered(sharding, x_BTD.dtype, gate_up_EUDF, down_EFD))
    pull = lambda turn: jax.vjp(functools.partial(one, turn), *arguments)[1](_flat(dy_BTD))
    add = lambda turn, sums: jax.tree.map(jnp.add, sums, pull(turn))
    dx, dweights, dgate_up, ddown = jax.lax.fori_loop(1, rounds, add, pull(jnp.int32(0)))
    width = _width_axes(sharding)
    dgate_up, ddown = _scattered(sharding, dgate_up, 2), _scattered(sharding, ddown, 2)
    return (
        jax.lax.psum(dx, width).reshape(x_BTD.shape).astype(x_BTD.dtype),
        jax.lax.psum(dweights, width).reshape(weights_BTK.shape),
        dgate_up.astype(gate_up_EUDF.dtype),
        ddown.astype(down_EFD.dtype),
    )


def _dispatch_plan(sharding, products, picks_BTK, experts_here):
    """Return the number of rounds and the function of one: (turn, x_BD, weights_BK, gate_up, down) -> partial y_BD."""
    picks_BK = _flat(picks_BTK)
    axes = sharding.axes("weights", "expert")
    if not axes:
        local = lambda turn, x, w, gate_up, down: products(x, picks_BK, w, gate_up, down)
        return 1, local
    B, K = picks_BK.shape
    P = sharding.size(axes)
    picks_R = picks_BK.reshape(-1)
    order_R = jnp.argsort(picks_R, stable=True)
    place_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(B * K), unique_indices=True)
    counts_E = jnp.bincount(picks_R, length=P * experts_here).astype(jnp.int32)
    counts_PE = jax.lax.all_gather(counts_E, axes)
    count_PP = counts_PE.reshape(P, P, experts_here).sum(-1)
    most = P * B * min(K, experts_here)
    room = min(most, -(-int(_CAPACITY_FACTOR * B * K) // 8) * 8)
    dispatcher = TokenDispatcher(axes, sharding.platform, room, jax.lax.axis_index(axes), count_PP)
    # Rows without an expert come last and are not sent.
    destination_R = jnp.minimum(picks_R[order_R] // experts_here, P - 1)
    # Received rows are ordered by source, then by expert, so the counts alone give the expert of a slot.
    own_PE = jax.lax.dynamic_slice_in_dim(counts_PE, dispatcher.me * experts_here, experts_here, 1)
    ends_PE = jnp.cumsum(own_PE.reshape(-1))

    def one(turn, x_BD, weights_BK, gate_up_EUDF, down_EFD):
        arrival = dispatcher.arrivals(turn)
        expert = jnp.searchsorted(ends_PE, arrival, side="right") % experts_here
        full = arrival < dispatcher.arriving
        pick = jnp.where(full, expert, experts_here).astype(jnp.int32)  # empty slots belong to no expert
        here = dispatcher.dispatch(x_BD[order_R // K], turn)
        done = products(here, pick[:, None], full[:, None].astype(jnp.float32), gate_up_EUDF, down_EFD)
        done = jnp.where(full[:, None], done, 0).astype(x_BD.dtype)
        y_RD = dispatcher.combine(done, turn, destination_R)[place_R]
        return jnp.einsum("BKD,BK->BD", y_RD.reshape(B, K, -1).astype(jnp.float32), weights_BK)

    return jax.lax.pmax(dispatcher.rounds, _token_axes(sharding)), one


def _flat(a):
    return a.reshape(-1, a.shape[-1])


def _width_axes(sharding) -> tuple[str, ...]:
    return sharding.axes("weights", "expert_mlp")


def _gathered(sharding, dtype, gate_up_EUDF, down_EFD):
    """Return this device's experts with their unsharded hidden size, in the compute dtype."""
    axes = sharding.axes("weights", "expert_embed")
    gather = lambda a, axis: jax.lax.all_gather(a, axes, axis=axis, tiled=True) if axes else a
    whole = lambda a, axis: gather(a.astype(dtype), axis)
    return whole(gate_up_EUDF, 2), whole(down_EFD, 2)


def _scattered(sharding, gradient, axis):
    """Sum the gradient over all devices that used these experts, and split it like the matrix."""
    split = sharding.axes("weights", "expert_embed")
    held = sharding.axes("weights", "expert") + split
    if split:
        gradient = jax.lax.psum_scatter(gradient, split, scatter_dimension=axis, tiled=True)
    return jax.lax.psum(gradient, tuple(a for a in _token_axes(sharding) if a not in held))
