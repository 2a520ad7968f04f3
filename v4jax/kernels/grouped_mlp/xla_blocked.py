"""Grouped expert MLP in blocks of equal size, one expert per block: static shapes and no dropped token, for XLA:CPU.

Rows are (token, top-k index) pairs sorted by expert. The rows of each expert are padded to a multiple of the block
size, so a block needs the weights of one expert and two dense products. A loop runs over the blocks in use: their
number depends on the data, their shape does not. XLA:CPU computes `ragged_dot` as E masked full products; this
implementation computes the chosen experts only.
"""

import functools

import jax
import jax.numpy as jnp

from v4jax.kernels.fp8_dot import gradient_rows, round_rows
from v4jax.kernels.fp8_dot.quantize import rows as tiled
from v4jax.kernels.grouped_mlp.swiglu import swiglu
from v4jax.kernels.tuning import tuned


def experts(x_BD, picks_BK, weights_BK, gate_up_EUDF, down_EFD, *, limit, fp8=False):
    """See `api.experts`. Products accumulate in float32."""
    if x_BD.shape[0] == 1:
        return _single(x_BD, picks_BK, weights_BK, gate_up_EUDF, down_EFD, limit, fp8)
    plan = _plan(picks_BK, gate_up_EUDF.shape[0])
    return _experts(x_BD, weights_BK, gate_up_EUDF, down_EFD, plan, limit, fp8)


def _single(x_1D, picks_1K, weights_1K, gate_up_EUDF, down_EFD, limit, fp8):
    """Run the experts of a single token one by one. Sorting its few rows would take time and save none."""

    def one(pick):
        expert, weight = pick
        gate_up = _both(gate_up_EUDF, expert, x_1D)
        h = swiglu(gradient_rows(gate_up) if fp8 else gate_up, limit) * weight
        h = (round_rows(h) if fp8 else h).astype(x_1D.dtype)
        return _dot("RF,FD->RD", h, _matrix(down_EFD, expert, x_1D))

    return jax.lax.map(one, (picks_1K[0], weights_1K[0])).sum(0)


def block_rows(rows: int, experts: int) -> int:
    """Return the block size in rows: the mean load of an expert, rounded up to a power of two, at most a tuned number.

    With this size padding stays a fraction of the work.

    Args:
        rows: number of (token, top-k index) rows.
        experts: number of experts.
    """
    mean = max(1, rows // experts)
    return min(tuned("grouped_mlp")["max_block_rows"], 1 << (mean - 1).bit_length())


def _plan(picks_BK, E):
    """Assign each (token, top-k index) row to a slot of a block.

    Returns:
        int32 arrays: expert of each block, number of blocks in use, row of each slot (B * K in an empty slot), and
        slot of each row.
    """
    rows = picks_BK.size
    size = block_rows(rows, E)
    blocks = -(-rows // size) + min(E, rows)
    expert_R = picks_BK.reshape(-1)
    order = jnp.argsort(expert_R, stable=True).astype(jnp.int32)
    counts_E = jnp.bincount(expert_R, length=E)
    blocks_E = -(-counts_E // size)
    block_end_E = jnp.cumsum(blocks_E)
    expert_of_block = jnp.minimum(jnp.searchsorted(block_end_E, jnp.arange(blocks), side="right"), E - 1)
    sorted_expert = expert_R[order]
    within = jnp.arange(rows) - (jnp.cumsum(counts_E) - counts_E)[sorted_expert]
    slot_sorted = ((block_end_E - blocks_E)[sorted_expert] * size + within).astype(jnp.int32)
    slot_of_row = jnp.zeros(rows, jnp.int32).at[order].set(slot_sorted, unique_indices=True)
    row_of_slot = jnp.full(blocks * size, rows, jnp.int32).at[slot_sorted].set(order, unique_indices=True)
    return expert_of_block.astype(jnp.int32), block_end_E[-1].astype(jnp.int32), row_of_slot, slot_of_row


def _slots(x_BD, weights_BK, plan):
    """Return inputs and routing weights in slot order, with zeros in empty slots."""
    _, _, row_of_slot, _ = plan
    K, empty = weights_BK.shape[1], row_of_slot == weights_BK.size
    x = jnp.where(empty[:, None], 0, x_BD[jnp.minimum(row_of_slot // K, x_BD.shape[0] - 1)])
    w = jnp.where(empty, 0, weights_BK.reshape(-1)[jnp.minimum(row_of_slot, weights_BK.size - 1)])
    return x, w


def _rounded(a, fp8):
    """Round the left operand of a product in tiles of the last axis if `fp8`, else return it unchanged."""
    return tiled(a) if fp8 else a


def _matrix(w_E, place, like):
    """Return one matrix in the dtype of `like`. `place` is the expert index, or (expert, 0 for gate or 1 for up)."""
    return w_E[place].astype(like.dtype)


def _both(w_EUDF, expert, x_RD):
    """Return the gate and up products of one expert, float32 [R, 2, F]."""
    return jnp.stack([_dot("RD,DF->RF", x_RD, _matrix(w_EUDF, (expert, u), x_RD)) for u in range(2)], 1)


def _side_by_side(w_EUDF, like):
    """Copy the gate and up matrices next to each other, [E, D, 2 F].

    One product for both halves is faster than two, which outweighs the copy if blocks are large.
    """
    E, U, D, F = w_EUDF.shape
    return w_EUDF.astype(like.dtype).swapaxes(1, 2).reshape(E, D, U * F)


def _dot(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _experts(x_BD, weights_BK, gate_up_EUDF, down_EFD, plan, limit, fp8):
    return _forward(x_BD, weights_BK, gate_up_EUDF, down_EFD, plan, limit, fp8)[0]


def _forward(x_BD, weights_BK, gate_up_EUDF, down_EFD, plan, limit, fp8):
    expert_of_block, in_use, row_of_slot, slot_of_row = plan
    D, F, size = x_BD.shape[1], down_EFD.shape[1], row_of_slot.size // expert_of_block.size
    x, w = _slots(x_BD, weights_BK, plan)
    if size == tuned("grouped_mlp")["max_block_rows"]:
        both_EDG = _side_by_side(gate_up_EUDF, x)
        first = lambda e, x: _dot("RD,DG->RG", x, both_EDG[e]).reshape(size, 2, F)
    else:
        first = lambda e, x: _both(gate_up_EUDF, e, x)

    def block(i, carry):
        gate_up_all, y_all = carry
        rows = lambda a: jax.lax.dynamic_slice_in_dim(a, i * size, size)
        e = expert_of_block[i]
        gate_up = first(e, rows(x))
        h = _rounded(swiglu(gate_up, limit) * rows(w)[:, None], fp8).astype(x.dtype)
        y = _dot("RF,FD->RD", h, _matrix(down_EFD, e, x))
        put = lambda a, v: jax.lax.dynamic_update_slice_in_dim(a, v, i * size, axis=0)
        return put(gate_up_all, gate_up), put(y_all, y)

    empty = lambda *width: jnp.zeros((row_of_slot.size, *width), jnp.float32)
    gate_up, y = jax.lax.fori_loop(0, in_use, block, (empty(2, F), empty(D)))
    out = y[slot_of_row].reshape(*weights_BK.shape, D).sum(1)
    return out, (x_BD, weights_BK, gate_up_EUDF, down_EFD, plan, gate_up)


def _backward(limit, fp8, saved, dout_BD):
    """Compute all gradients block by block. Blocks of one expert add to its weight gradient in place."""
    x_BD, weights_BK, gate_up_EUDF, down_EFD, plan, gate_up = saved
    expert_of_block, in_use, row_of_slot, slot_of_row = plan
    D, F, size = x_BD.shape[1], down_EFD.shape[1], row_of_slot.size // expert_of_block.size
    x, w = _slots(x_BD, weights_BK, plan)
    empty = row_of_slot == weights_BK.size
    dy = jnp.where(empty[:, None], 0, dout_BD[jnp.minimum(row_of_slot // weights_BK.shape[1], x_BD.shape[0] - 1)])
    dy = dy.astype(x.dtype)
    both_EDG = _side_by_side(gate_up_EUDF, x)

    def block(i, carry):
        dx_all, dw_all, dgate_up, ddown = carry
        rows = lambda a: jax.lax.dynamic_slice_in_dim(a, i * size, size)
        e = expert_of_block[i]
        h, pull = jax.vjp(lambda g: swiglu(g, limit), rows(gate_up))
        dh = _dot("RD,FD->RF", rows(dy), _matrix(down_EFD, e, x))
        (dg,) = pull(dh * rows(w)[:, None])
        dg = _rounded(dg, fp8).reshape(size, 2 * F).astype(x.dtype)
        dx = _dot("RG,DG->RD", dg, both_EDG[e])
        weighted = _rounded(h * rows(w)[:, None], fp8).astype(x.dtype)
        dgate_up = dgate_up.at[e].add(_dot("RD,RG->DG", rows(x), dg))
        ddown = ddown.at[e].add(_dot("RF,RD->FD", weighted, rows(dy)))
        put = lambda a, v: jax.lax.dynamic_update_slice_in_dim(a, v, i * size, axis=0)
        return put(dx_all, dx), put(dw_all, jnp.sum(h * dh, -1)), dgate_up, ddown

    E, slots = gate_up_EUDF.shape[0], row_of_slot.size
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    dx, dw, dgate_up, ddown = jax.lax.fori_loop(
        0, in_use, block, (zeros(slots, D), zeros(slots), zeros(E, D, 2 * F), zeros(E, F, D))
    )
    dx_BD = dx[slot_of_row].reshape(*weights_BK.shape, D).sum(1)
    dweights_BK = dw[slot_of_row].reshape(weights_BK.shape)
    return (
        dx_BD.astype(x_BD.dtype),
        dweights_BK.astype(weights_BK.dtype),
        dgate_up.reshape(E, D, 2, F).swapaxes(1, 2).astype(gate_up_EUDF.dtype),
        ddown.astype(down_EFD.dtype),
        None,
    )


_experts.defvjp(_forward, _backward)
