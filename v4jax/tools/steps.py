"""The programs of a plan, lowered for devices that need not exist: a training step, a decode step, a prefill chunk.

Training is the trainer's own step. Serving is one `shard_map` over all devices: each holds the records and pages of its
own rows and runs the engine's program (`serve.programs`) on them; tokens travel to the experts, and nothing else does.
The engine itself is on one device yet, so what is lowered here is the step of a sharded engine, without its scheduler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from v4jax.cache.spec import Layout
from v4jax.config import Config, Mesh
from v4jax.core.check import UserError
from v4jax.models.transformer import Transformer
from v4jax.nn.kept import Kept
from v4jax.parallel.rules import Sharding, make_sharding, use
from v4jax.serve import live, programs
from v4jax.serve.programs import Heads, Live
from v4jax.tools.estimate import Work

_MATRICES = {"MXD": jnp.float32, "YXD": jnp.float32, "PW": jnp.float32, "VK": jnp.int32}  # others are bfloat16


class Step(NamedTuple):
    """A compiled-to-be function and abstract arguments with shardings."""

    function: jax.stages.Wrapped
    arguments: tuple

    def lower(self) -> jax.stages.Lowered:
        """The program for the devices of its shardings."""
        return self.function.lower(*self.arguments)


def train(config: Config, mesh: Mesh, work: Work, devices: Sequence[jax.Device]) -> Step:
    """The training step of `work.rows` rows of `work.context` tokens. Raises UserError as the trainer does."""
    from v4jax.train.state import Trainer

    train = dataclasses.replace(config.train, batch_size=work.rows)
    data = dataclasses.replace(config.data, seq_len=work.context)
    trainer = Trainer(dataclasses.replace(config, train=train, data=data, mesh=mesh), devices=devices)
    row = jax.ShapeDtypeStruct((work.rows, work.context), np.int32, sharding=trainer.batch_sharding)
    names = ("tokens_BT", "targets_BT", "targets2_BT", "segments_BT", "positions_BT")
    return Step(trainer.step, (trainer.abstract(), dict.fromkeys(names, row)))


def serve(config: Config, mesh: Mesh, work: Work, devices: Sequence[jax.Device]) -> Step:
    """A step of `work.rows` sequences with room for `work.context` tokens each, split evenly over all devices.

    Mode "decode": one token of each sequence. Mode "prefill": on each device a chunk of one of its sequences. Weights
    are in the model's dtype, the cache in `cache.layout` with a page and a record to spare, as the engine holds them.
    Raises UserError for rows that do not divide, and for meshes that split more than experts and rows.
    """
    sharding = make_sharding(mesh, devices)
    rows = _rows_of_a_device(sharding, work)
    limits = dataclasses.replace(config.serve, max_batch=rows, max_seq_len=work.context, speculative_tokens=0)
    live.check(config.model, limits, config.cache)
    everywhere = sharding.axes("activations", "batch")
    graphdef, variables = nnx.split(nnx.eval_shape(lambda: Transformer(config.model, nnx.Rngs(0))))
    leaves, _ = jax.tree.flatten(variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    structure = programs.structure(graphdef, jax.tree.structure(variables))
    specs = [sharding.weight(leaf.letters) for leaf in leaves]
    dtype = jnp.dtype(config.model.dtype)
    of = lambda leaf: _MATRICES.get(leaf.letters, dtype if len(leaf.letters) > 1 else jnp.float32)
    weights = [
        jax.ShapeDtypeStruct(leaf.get_value().shape, of(leaf), sharding=sharding.named(spec))
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    split = PartitionSpec(everywhere)
    here = sharding.named(split)
    whole = lambda shape, dtype, where=here: jax.ShapeDtypeStruct(
        (sharding.mesh.size * shape[0], *shape[1:]), dtype, sharding=where
    )

    def placed(kind, kept):
        at = lambda where: jax.tree.map(lambda a: whole(a.shape, a.dtype, where), kept)
        if not config.cache.hot or kind not in live.FAR:
            return at(here)
        part = live.FAR[kind]
        return dataclasses.replace(at(here), **{part: getattr(at(here.with_memory_kind("pinned_host")), part)})

    layers = jax.eval_shape(lambda: _layers(config, rows, work.context))
    state = Live([[placed(*each)] for each in zip(config.model.schedule, layers, strict=True)], None)
    ints = lambda *shape: whole(shape, jnp.int32)
    table = ints(1 + rows, _pages(config, work.context))
    decode = work.mode == "decode"
    if decode:
        inputs = (Heads(ints(1 + rows), ints(1 + rows), ints(1 + rows, 0)), (ints(rows), table))
    else:
        chunk = min(work.context, config.serve.prefill_chunk)
        inputs = (ints(1, chunk + 1), (ints(1), ints(1), ints(1)), table)

    def one(weights, state, *inputs):
        with use(dataclasses.replace(sharding, inside=True)):
            if decode:
                return programs.decode(structure, weights, state, *inputs, False)
            tokens_1T, scalars, table_ZA = inputs
            state, x_11XD, finite = programs.prefill(
                structure, weights, state, tokens_1T[0], *(a[0] for a in scalars), table_ZA
            )
            return state, x_11XD, finite[None]

    mapped = jax.shard_map(
        one, mesh=sharding.mesh, in_specs=(specs, *[split] * (1 + len(inputs))), out_specs=split, check_vma=False
    )
    # The state's places are told, or what is in host memory would be written to a copy. The engine holds weights that a
    # program does not use, such as those of the MTP layer, all the same.
    results = jax.tree.map(lambda a: a.sharding, state), here, here
    jitted = jax.jit(mapped, donate_argnums=1, keep_unused=True, out_shardings=results)
    return Step(jitted, (weights, state, *inputs))


def _rows_of_a_device(sharding: Sharding, work: Work) -> int:
    layout, mesh = sharding.layout, sharding.mesh
    everywhere = sharding.axes("activations", "batch")
    if sharding.size(everywhere) != mesh.size:
        over = ", ".join(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in everywhere)
        raise UserError(f"a {work.mode} step is compiled with rows over all devices, and layout {layout.name!r} splits "
                        f"something else over {over}; leave those axes at 1, or add --analytic")  # fmt: skip
    weights = {axis for name, _ in layout.weights if name != "expert" for axis in sharding.axes("weights", name)}
    if weights:
        raise UserError(f"a {work.mode} step is compiled with experts split and all other weights whole, and layout "
                        f"{layout.name!r} splits more; take layout 'serve', or add --analytic")  # fmt: skip
    if work.rows % mesh.size:
        raise UserError(f"{work.rows} rows cannot be split over {mesh.size} devices; take a multiple, or --analytic")
    return work.rows // mesh.size


def _pages(config: Config, tokens: int) -> int:
    return -(-tokens // Layout(config.model, config.cache.layout, config.cache.block).block)


def _layers(config: Config, rows: int, tokens: int) -> list[Kept]:
    """What the engine's layers keep for `rows` sequences, with a record and a page to spare (number 0), as zeros."""
    cache, pages = config.cache, 1 + rows * _pages(config, tokens)
    layout = Layout(config.model, cache.layout, cache.block, cache.hot)
    return [live.new_layer(layout, kind, pages, 1 + rows, host=jnp.zeros) for kind in config.model.schedule]
