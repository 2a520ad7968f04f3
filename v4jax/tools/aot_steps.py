"""The programs of a plan, lowered for devices that need not exist: a training step, a decode step, a prefill chunk.

They are the programs of real runs: the trainer's step, and the engine's steps (`serve.model_steps`) on a mesh, where
each device holds the state slots and KV blocks of its own rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax.cache import allocate
from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.cache.paged_cache import PagedLayerCache
from v4jax.config import Config, Mesh
from v4jax.core.errors import UserError
from v4jax.models.transformer import Transformer
from v4jax.parallel.rules import make_mesh_rules
from v4jax.serve import data_parallel, model_steps
from v4jax.serve.model_steps import DecodeState, KVCaches
from v4jax.tools.cost_model import Workload

_MATRICES = {"MXD": jnp.float32, "YXD": jnp.float32, "PW": jnp.float32, "VK": jnp.int32}  # others are bfloat16


class LoweredStep(NamedTuple):
    """A jitted function and its abstract arguments, which carry shardings."""

    function: jax.stages.Wrapped
    arguments: tuple

    def lower(self) -> jax.stages.Lowered:
        """Lower the function for the devices of the arguments' shardings."""
        return self.function.lower(*self.arguments)


def train(config: Config, mesh: Mesh, work: Workload, devices: Sequence[jax.Device]) -> LoweredStep:
    """The training step of `work.rows` rows of `work.context` tokens. Raises UserError as the trainer does."""
    from v4jax.train.trainer import Trainer

    train = dataclasses.replace(config.train, batch_size=work.rows)
    data = dataclasses.replace(config.data, seq_len=work.context)
    trainer = Trainer(dataclasses.replace(config, train=train, data=data, mesh=mesh), devices=devices)
    row = jax.ShapeDtypeStruct((work.rows, work.context), np.int32, sharding=trainer.batch_sharding)
    names = ("tokens_BT", "targets_BT", "targets2_BT", "segments_BT", "positions_BT")
    return LoweredStep(trainer.step, (trainer.abstract(), dict.fromkeys(names, row)))


def serve(config: Config, mesh: Mesh, work: Workload, devices: Sequence[jax.Device]) -> LoweredStep:
    """An engine step on `work.rows` sequences of up to `work.context` tokens, split evenly over all devices.

    Mode "decode" computes one token of each sequence; mode "prefill" computes on each device a chunk of one sequence.
    As in the engine, the weights are in the model's dtype, and the cache is in `cache.kv_cache_dtype` and includes the
    null block and the null slot.

    Raises:
      UserError: The rows do not split evenly, or no engine supports the mesh (`serve.data_parallel`).
    """
    sharding = make_mesh_rules(mesh, devices)
    data_parallel.validate_sharding(sharding)
    if work.rows % sharding.mesh.size:
        raise UserError(
            f"{work.rows} rows cannot be split over {sharding.mesh.size} devices; take a multiple, or --analytic"
        )
    rows = work.rows // sharding.mesh.size
    limits = dataclasses.replace(config.serve, max_num_seqs=rows, max_model_len=work.context, num_speculative_tokens=0)
    allocate.validate_host_resident(config.model, limits, config.cache)
    graphdef, variables = nnx.split(nnx.eval_shape(lambda: Transformer(config.model, nnx.Rngs(0))))
    leaves, _ = jax.tree.flatten(variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    structure = model_steps.model_def(graphdef, jax.tree.structure(variables), sharding)
    dtype = jnp.dtype(config.model.dtype)
    of = lambda leaf: _MATRICES.get(leaf.letters, dtype if len(leaf.letters) > 1 else jnp.float32)
    weights = [
        jax.ShapeDtypeStruct(leaf.get_value().shape, of(leaf), sharding=sharding.named(spec))
        for leaf, spec in zip(leaves, structure.specs(), strict=True)
    ]
    here = sharding.named(data_parallel.row_spec(sharding))
    whole = lambda shape, dtype, where=here: jax.ShapeDtypeStruct(
        (sharding.mesh.size * shape[0], *shape[1:]), dtype, sharding=where
    )

    def placed(kind, kept):
        at = lambda where: jax.tree.map(lambda a: whole(a.shape, a.dtype, where), kept)
        if not config.cache.kv_device_entries or kind not in allocate.HOST_FIELDS:
            return at(here)
        part = allocate.HOST_FIELDS[kind]
        return dataclasses.replace(at(here), **{part: getattr(at(here.with_memory_kind("pinned_host")), part)})

    layers = jax.eval_shape(lambda: _layers(config, rows, work.context))
    state = KVCaches([[placed(*each)] for each in zip(config.model.layer_types, layers, strict=True)], None)
    ints = lambda *shape: whole(shape, jnp.int32)
    table = ints(1 + rows, _pages(config, work.context))
    decode = work.mode == "decode"
    if decode:
        inputs = (DecodeState(ints(1 + rows), ints(1 + rows), ints(1 + rows, 0)), (ints(rows), table))
    else:
        chunk = min(work.context, config.serve.max_num_batched_tokens)
        inputs = (ints(1, chunk + 1), (ints(1), ints(1), ints(1)), table)

    def run(weights, state, *inputs):
        if decode:
            return model_steps.decode(structure, weights, state, *inputs, False)
        tokens_DT, scalars_3D, block_table_ZA = inputs
        return model_steps.prefill(structure, weights, state, tokens_DT, *scalars_3D, block_table_ZA)

    # Output shardings keep the memory kind of the state; without them, host-resident arrays would be written to a copy.
    # `keep_unused` counts weights that a program does not use (the MTP layer's), because the engine holds them too.
    results = jax.tree.map(lambda a: a.sharding, state), here, here
    jitted = jax.jit(run, donate_argnums=1, keep_unused=True, out_shardings=results)
    return LoweredStep(jitted, (weights, state, *inputs))


def _pages(config: Config, tokens: int) -> int:
    return -(-tokens // KVCacheSpec(config.model, config.cache.kv_cache_dtype, config.cache.block_size).block_size)


def _layers(config: Config, rows: int, tokens: int) -> list[PagedLayerCache]:
    """Zeroed caches of the engine's layers for `rows` sequences, with the null block and the null slot (index 0)."""
    cache, pages = config.cache, 1 + rows * _pages(config, tokens)
    layout = KVCacheSpec(config.model, cache.kv_cache_dtype, cache.block_size, cache.kv_device_entries)
    return [allocate.allocate_layer(layout, kind, pages, 1 + rows, host=jnp.zeros) for kind in config.model.layer_types]
