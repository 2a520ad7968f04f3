"""Jitted steps of the engine: prefill, decode, sample, propose drafts, copy and zero state.

Each step takes the weights and the KV caches and returns the caches updated in place (they are donated). Shapes are
static and few: prompt chunks and batches are padded, and contexts of any length share one program, because readers of
the cache walk only the filled blocks. Padding rows of a batch use the null state slot 0 and have no block, by which
the model recognizes them (`ForwardBatch.valid_BT`).

A step is written for one device. On a mesh it runs on all devices at once, inside `shard_map`. There the first axis of
every array but the weights holds the rows of all devices (`serve.data_parallel`), so arrays with one item per device,
such as a chunk's start, have shape [1]. Only the expert layers communicate: they send tokens to the experts' devices.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from v4jax.cache.paged_cache import PagedLayerCache
from v4jax.models.transformer import KVCacheList, Transformer, continuation_batch
from v4jax.nn.kv_cache_interface import CacheSlots
from v4jax.parallel.host_memory import host_gather, host_scatter
from v4jax.parallel.rules import MeshRules, use_rules
from v4jax.serve.data_parallel import row_spec
from v4jax.serve.sampler import SamplingFlags, SamplingTensors, logprobs, sample

_SCORED_POSITIONS = 16  # prompt positions whose logits are in memory at once


class KVCaches(NamedTuple):
    """KV caches of all layers, and of the MTP layer if the engine uses speculative decoding."""

    layers: KVCacheList
    mtp: PagedLayerCache | None


class DecodeState(NamedTuple):
    """Decode state by state slot: the newest token, not yet fed to the model, its position, and its draft tokens.

    Shapes: int32 [slots], [slots] and [slots, num_speculative_tokens].
    """

    token_Z: jax.Array
    position_Z: jax.Array
    draft_ZK: jax.Array


class ModelDef:
    """A model without its arrays, and its mesh, if it is on one; compared by identity: hashing the graph itself would
    cost a step milliseconds."""

    def __init__(self, graphdef, tree, sharding: MeshRules | None = None):
        self._graphdef, self._tree, self.sharding = graphdef, tree, sharding

    def model(self, weights: list[jax.Array]) -> Transformer:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._tree, weights))

    def placed(self, weights: list[jax.Array]) -> list[jax.Array]:
        """Return the weights sharded over the mesh; correctly placed arrays are not copied."""
        if self.sharding is None:
            return weights
        return [jax.device_put(a, self.sharding.named(spec)) for a, spec in zip(weights, self.specs(), strict=True)]

    def specs(self) -> list[PartitionSpec]:
        """Return the PartitionSpec of each weight."""
        variables = jax.tree.unflatten(self._tree, range(self._tree.num_leaves))
        leaves = jax.tree.leaves(variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        return [self.sharding.weight(leaf.letters) for leaf in leaves for _ in jax.tree.leaves(leaf)]


model_def = functools.lru_cache(maxsize=16)(ModelDef)  # models of equal structure share their programs


def _jit_step(weights: bool = True, donate: tuple[int, ...] = (), static: tuple[int, ...] = ()):
    """Decorate a function of (model definition, ...) to be jitted, on the definition's mesh if it has one.

    Args:
        weights: whether the next argument is the list of weights.
        donate, static: indices of donated and static arguments, counted over all arguments.
    """

    def decorate(function):
        @functools.wraps(function)
        def run(model_def, *args):
            if model_def.sharding is None:
                return function(model_def, *args)
            return _on_mesh(functools.partial(function, model_def), model_def, args, weights, static)

        return jax.jit(run, static_argnums=(0, *static), donate_argnums=donate)

    return decorate


def _on_mesh(function, model_def: ModelDef, args: tuple, weights: bool, static: tuple[int, ...]):
    sharding = model_def.sharding
    split = row_spec(sharding)
    moving = [i for i in range(len(args)) if i + 1 not in static]
    specs = [model_def.specs() if weights and i == 0 else split for i in moving]

    def one(*parts):
        given = list(args)
        for i, part in zip(moving, parts, strict=True):
            given[i] = part
        with use_rules(dataclasses.replace(sharding, per_device=True)):
            return function(*given)

    mapped = jax.shard_map(one, mesh=sharding.mesh, in_specs=tuple(specs), out_specs=split, check_vma=False)
    return mapped(*(args[i] for i in moving))


@_jit_step(donate=(2,))
def prefill(
    model_def,
    weights,
    kv_caches: KVCaches,
    tokens_1T: jax.Array,
    start_1,
    count_1,
    state_slot_1,
    block_table_ZA,
):
    """Prefill one chunk of one request.

    Args:
        tokens_1T: int32 [1, T + 1]; the last token is only input of the MTP layer.
        start_1, count_1, state_slot_1: int32 [1]. A count of 0, with slot 0, computes nothing.

    Returns:
        The KV caches, the streams [1, 1, X, D] of the last token, and bool [1], whether these are finite. A non-finite
        value reaches every later token through the sliding window.
    """
    return _prefill(model_def.model(weights), kv_caches, tokens_1T, start_1, count_1, state_slot_1, block_table_ZA)[:3]


@_jit_step(donate=(2,), static=(8,))
def prefill_with_logprobs(
    model_def,
    weights,
    kv_caches: KVCaches,
    tokens_1T: jax.Array,
    start_1,
    count_1,
    state_slot_1,
    block_table_ZA,
    num_logprobs: int,
):
    """Prefill one chunk as `prefill` does, and return log-probabilities of the tokens that follow each position, too.

    Args:
        num_logprobs: number of likeliest tokens that are reported at each position; static.

    Returns:
        The results of `prefill`, and `sampler.logprobs` of tokens_1T[:, 1:], each [1, T, ...].
    """
    model = model_def.model(weights)
    *results, x_BTXD = _prefill(model, kv_caches, tokens_1T, start_1, count_1, state_slot_1, block_table_ZA)
    T = x_BTXD.shape[1]
    pad = -T % _SCORED_POSITIONS  # logits of a whole chunk would need gigabytes
    pieces = lambda a: a.reshape(-1, _SCORED_POSITIONS, *a.shape[1:])
    x_NPXD = pieces(jnp.pad(x_BTXD[0], [(0, pad), (0, 0), (0, 0)]))
    next_NP = pieces(jnp.pad(tokens_1T[0, 1:], (0, pad)))

    def score(piece):
        x_PXD, next_P = piece
        return logprobs(model.logits(x_PXD[None])[0], next_P, num_logprobs)

    scored = jax.lax.map(score, (x_NPXD, next_NP))  # [pieces, positions of a piece, ...]
    return *results, jax.tree.map(lambda a: a.reshape(1, T + pad, *a.shape[2:])[:, :T], scored)


def _prefill(model: Transformer, kv_caches: KVCaches, tokens_1T, start_1, count_1, state_slot_1, block_table_ZA):
    """Return the results of `prefill` and the streams of all positions."""
    slots = CacheSlots(state_slot_1, block_table_ZA[state_slot_1])
    chunk = continuation_batch(tokens_1T[:, :-1], start_1, count_1, slots)
    x_BTXD, layers, _ = model.forward_hidden(chunk, kv_caches.layers)
    mtp = kv_caches.mtp
    if mtp is not None:
        _, _, mtp, _ = model.mtp_forward(x_BTXD, tokens_1T[:, 1:], chunk, mtp)
    x_11XD = jax.lax.dynamic_slice_in_dim(x_BTXD, count_1[0] - 1, 1, axis=1)
    return KVCaches(layers, mtp), x_11XD, jnp.isfinite(x_11XD).all((1, 2, 3)), x_BTXD


@_jit_step(donate=(2,), static=(5,))
def decode(model_def, weights, kv_caches: KVCaches, decode_state: DecodeState, rows, invariant: bool):
    """Decode each row's newest token and its draft tokens.

    Args:
        rows: (state_slot_B, block_table_ZA).
        invariant: compute row by row, so that the bits of a row do not depend on the batch.

    Returns:
        The KV caches, the streams [B, T, X, D] and float32 logits [B, T, V].
    """
    model = model_def.model(weights)
    state_slot_B, block_table_ZA = rows
    if not invariant:
        layers, x_BTXD, logits_BTV = _read(model, kv_caches.layers, decode_state, state_slot_B, block_table_ZA)
        return KVCaches(layers, kv_caches.mtp), x_BTXD, logits_BTV

    def one(layers, record):
        layers, x_BTXD, logits_BTV = _read(model, layers, decode_state, record[None], block_table_ZA)
        return layers, (x_BTXD[0], logits_BTV[0])

    layers, (x_BTXD, logits_BTV) = jax.lax.scan(one, kv_caches.layers, state_slot_B)
    return KVCaches(layers, kv_caches.mtp), x_BTXD, logits_BTV


def _read(model: Transformer, layers: KVCacheList, decode_state: DecodeState, state_slot_B, block_table_ZA):
    token_B1 = decode_state.token_Z[state_slot_B][:, None]
    tokens_BT = jnp.concatenate([token_B1, decode_state.draft_ZK[state_slot_B]], axis=1)
    slots = CacheSlots(state_slot_B, block_table_ZA[state_slot_B])
    chunk = continuation_batch(tokens_BT, decode_state.position_Z[state_slot_B], None, slots)
    x_BTXD, layers, _ = model.forward_hidden(chunk, layers)
    return layers, x_BTXD, model.logits(x_BTXD)


@_jit_step()
def logits(model_def, weights, x_BTXD: jax.Array) -> jax.Array:
    """Float32 logits [B, T, V]."""
    return model_def.model(weights).logits(x_BTXD)


# Separate from `decode`, so that new sampling options do not recompile the model.
@_jit_step(weights=False, donate=(2,), static=(5, 6))
def sample_tokens(
    model_def,
    logits_BTV: jax.Array,
    decode_state: DecodeState,
    place,
    options: SamplingTensors,
    plan: SamplingFlags,
    invariant: bool,
    token_counts_ZV: jax.Array | None,
    mask_BW: jax.Array | None,
):
    """Sample a token at every computed position, and advance each row past its accepted draft tokens.

    The sample at a position depends only on the tokens before it. A draft token is accepted if it equals the sample, so
    the tokens are those of decoding without drafts, whatever their distribution.

    Args:
        place: (state_slot_B, position_B of the first sample; None means the position after each row's newest token).
        invariant: sample row by row, as in `decode`.
        token_counts_ZV: int32 [slots, V], `sampler.token_counts` of each state slot; only if a row has penalties.
        mask_BW: see `sample`; None allows all tokens.

    Returns:
        The decode state, and (`SamplerOutput` arrays [B, T, ...], count_B of the tokens that are valid).
    """
    state_slot_B, position_B = place
    B, T, V = logits_BTV.shape
    if position_B is None:
        position_B = decode_state.position_Z[state_slot_B] + 1
    each = lambda a: jnp.repeat(a, T, axis=0)
    position_BT = position_B[:, None] + jnp.arange(T)
    drafts_BK = decode_state.draft_ZK[state_slot_B][:, : T - 1]
    count_BTV = None if token_counts_ZV is None else _counts_before(token_counts_ZV[state_slot_B], drafts_BK)
    rows = (logits_BTV.reshape(B * T, V), jax.tree.map(each, options), position_BT.reshape(-1))
    more = (None if count_BTV is None else count_BTV.reshape(B * T, V), jax.tree.map(each, mask_BW))
    if invariant:

        def one(both):
            row, extra = jax.tree.map(lambda a: a[None], both)
            return sample(*row, plan, *extra)

        sampled = jax.tree.map(lambda a: a[:, 0], jax.lax.map(one, (rows, more)))
    else:
        sampled = sample(*rows, plan, *more)
    sampled = jax.tree.map(lambda a: a.reshape(B, T, *a.shape[1:]), sampled)
    right_BK = sampled.token_B[:, :-1] == drafts_BK
    more_B = jnp.cumprod(right_BK, axis=1).sum(1).astype(jnp.int32)
    newest_B = jnp.take_along_axis(sampled.token_B, more_B[:, None], axis=1)[:, 0]
    decode_state = decode_state._replace(
        token_Z=decode_state.token_Z.at[state_slot_B].set(newest_B),
        # Padding rows stay at position 0, because cache readers walk as far as the longest row.
        position_Z=decode_state.position_Z.at[state_slot_B].set(jnp.where(state_slot_B > 0, position_B + more_B, 0)),
    )
    return decode_state, (sampled, more_B + 1)


def _counts_before(count_BV: jax.Array, drafts_BK: jax.Array) -> jax.Array:
    """Token counts [B, 1 + K, V] before each position, if all draft tokens before it are accepted."""
    counts = [count_BV]
    for drafts_B in jnp.moveaxis(drafts_BK, 1, 0):
        counts.append(counts[-1].at[jnp.arange(len(drafts_B)), drafts_B].add(1))
    return jnp.stack(counts, axis=1)


@_jit_step(weights=False, donate=(1,))
def count_tokens(model_def, token_counts_ZV: jax.Array, state_slot_B, token_BT, count_B) -> jax.Array:
    """Add the valid tokens of one step to the token counts; the arguments are results of `sample_tokens`."""
    valid_BT = jnp.arange(token_BT.shape[1]) < count_B[:, None]
    return token_counts_ZV.at[state_slot_B[:, None], token_BT].add(valid_BT.astype(jnp.int32))


@_jit_step(weights=False, donate=(1,))
def set_token_counts(model_def, token_counts_ZV: jax.Array, state_slot_1, count_1V) -> jax.Array:
    """Set the token counts of one state slot."""
    return token_counts_ZV.at[state_slot_1].set(count_1V)


@_jit_step(donate=(2, 3))
def propose_draft(model_def, weights, mtp: PagedLayerCache, decode_state: DecodeState, x_BTXD, drawn, state_slot_B):
    """Propose draft tokens after each row's newest token, by the MTP layer.

    Beyond the first draft token the layer continues from its own streams, for which it was not trained.

    Args:
        x_BTXD: streams of the positions computed last.
        drawn: (token_BT sampled there, count_B of the valid ones).

    Returns:
        The MTP layer's cache, and the decode state with the draft tokens.
    """
    model = model_def.model(weights)
    token_BT, count_B = drawn
    # A window layer has no blocks, so the block table only marks valid rows.
    slots = CacheSlots(state_slot_B, jnp.where(state_slot_B > 0, state_slot_B, -1)[:, None])
    start_B = decode_state.position_Z[state_slot_B] - count_B
    chunk = continuation_batch(token_BT, start_B, None, slots)
    logits_BTV, x_BTXD, mtp, _ = model.mtp_forward(x_BTXD, token_BT, chunk, mtp)
    at = lambda a: jnp.take_along_axis(a, (count_B - 1).reshape(-1, *[1] * (a.ndim - 1)), axis=1)
    logits_BTV = at(logits_BTV)
    x_BTXD = at(x_BTXD)
    drafts = []
    for more in range(decode_state.draft_ZK.shape[1]):
        if more:
            chunk = continuation_batch(drafts[-1], start_B + count_B + more - 1, None, slots)
            logits_BTV, x_BTXD, mtp, _ = model.mtp_forward(x_BTXD, drafts[-1], chunk, mtp)
        drafts.append(jnp.argmax(logits_BTV, -1).astype(jnp.int32))
    draft_ZK = decode_state.draft_ZK.at[state_slot_B].set(jnp.concatenate(drafts, axis=1))
    return mtp, decode_state._replace(draft_ZK=draft_ZK)


@_jit_step(weights=False, donate=(1,))
def copy_state(model_def, kv_caches: KVCaches, source_1: jax.Array, target_1: jax.Array) -> KVCaches:
    """Copy one state slot to another; both int32 [1]."""

    def one(cache: PagedLayerCache) -> PagedLayerCache:
        return cache.map_state(lambda a: host_scatter(a, host_gather(a, source_1), target_1))

    return jax.tree.map(one, kv_caches, is_leaf=lambda a: isinstance(a, PagedLayerCache))


@_jit_step(weights=False, donate=(1,))
def zero_state(model_def, kv_caches: KVCaches, state_slot_1: jax.Array, page_1A: jax.Array) -> KVCaches:
    """Zero a state slot and blocks (int32, -1 for none). Masks hide stale values, but 0 * NaN is NaN."""

    def one(cache: PagedLayerCache) -> PagedLayerCache:
        return cache.map_state(lambda a: host_scatter(a, 0, state_slot_1)).zero_blocks(page_1A[0])

    return jax.tree.map(one, kv_caches, is_leaf=lambda a: isinstance(a, PagedLayerCache))
