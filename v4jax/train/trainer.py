"""Training state and the jitted training step, on one device or on a device mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from v4jax.config import Config
from v4jax.core.errors import UserError
from v4jax.models.layer_stacks import from_layer_dict, from_stacked_dict, layers_of, to_layer_dict, to_stacked_dict
from v4jax.models.transformer import Transformer
from v4jax.nn.linear import mark_low_precision
from v4jax.parallel.rules import make_mesh_rules, use_rules, validate_used
from v4jax.train.loss import Batch, heldout_nll, loss
from v4jax.train.optim import make_optimizer, schedule, update_bias
from v4jax.train.spike_guard import CHECKPOINT_NAMES, SpikeGuardState, check_step, new_guard, select_state


class TrainState(NamedTuple):
    """Everything that a training step changes.

    `params` and `fixed` are keyed by flat names (see `models.layer_stacks.to_stacked_dict`).
    """

    params: dict[str, jax.Array]
    fixed: dict[str, jax.Array]  # router biases and hash tables
    opt: Any
    step: jax.Array  # int32 scalar: number of steps done, including skipped steps
    guard: SpikeGuardState | None = None  # None if `train.spike_action` is "off"


class Trainer:
    """The constant parts of a training run: model structure, optimizer, shardings and jitted functions.

    If `config.mesh` names sharding rules, the state and the batch are sharded over the mesh, and every jitted function
    is one SPMD program for all devices.

    Args:
      config: The run's config.
      optimizer: The transformation of the parameters; None builds the one of `train.optim.make_optimizer`.
      devices: The devices of the mesh; None takes all devices.

    Raises:
      UserError: The mesh does not fit the model or the batch.
    """

    def __init__(
        self,
        config: Config,
        optimizer: optax.GradientTransformation | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        self.config = config
        train = config.train
        abstract = nnx.eval_shape(lambda: self._new_model(nnx.Rngs(0)))
        mark_low_precision(abstract, train.matmul_precision, train.expert_weight_format)
        self.runs = list(abstract.stack_specs)
        self._graph, self._params, self._fixed = nnx.split(abstract, nnx.Param, ...)
        leaves = nnx.to_flat_state(self._params)
        self._axes = {".".join(map(str, path)): leaf.letters for path, leaf in leaves}
        self._optimizer = optimizer or make_optimizer(config.train, self._axes)
        self.sharding = make_mesh_rules(config.mesh, devices)
        shapes = {".".join(map(str, path)): leaf.get_value().shape for path, leaf in leaves}
        self._place_on_mesh(shapes)
        self._rates = {"lr": schedule(train, train.lr), "adam_lr": schedule(train, train.adam_lr)}

    @functools.cached_property
    def step(self):
        """The jitted training step: `_step`. The argument `state` is donated."""
        state = self.state_sharding
        return self._jit(self._step, (state, self.batch_sharding), (state, self._replicated), donate_argnums=0)

    @functools.cached_property
    def evaluate(self):
        """The jitted evaluation of one batch: `_evaluate`."""
        return self._jit(self._evaluate, (self.state_sharding, self.batch_sharding), self._replicated)

    @functools.cached_property
    def finite(self):
        """The jitted check of a state: `_finite`."""
        return self._jit(self._finite, (self.state_sharding,), self._replicated)

    @functools.cached_property
    def _flat(self):
        """`_to_flat`, jitted if layers are stacked.

        Unstacking layers slices arrays. Without stacks `_to_flat` only renames, and jit would copy the arrays.
        """
        return self._jit(self._to_flat, None, None) if self.config.train.scan else self._to_flat

    def _new_model(self, rngs: nnx.Rngs) -> Transformer:
        train = self.config.train
        return Transformer(self.config.model, rngs, train.scan, train.remat, "streams" in train.offload)

    def _place_on_mesh(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Set the shardings of the state, the batch and replicated results; all are None without a mesh."""
        self._replicated = self.batch_sharding = self.state_sharding = self._param_sharding = None
        self.process_share = (0, 1)
        if self.sharding is None:
            return
        validate_used(self.sharding.rules, list(self._axes.values()))
        self._replicated = self.sharding.named(PartitionSpec())
        self.batch_sharding = self.sharding.named(self.sharding.activation("BT"))
        self._param_sharding = self.sharding.parameters(self._axes, shapes)
        self.process_share = self._share()
        abstract = self.abstract()
        self.state_sharding = self._state_shardings(abstract)
        if "optimizer" in self.config.train.offload:
            moved = lambda sharding, leaf: sharding.with_memory_kind("pinned_host") if leaf.ndim else sharding
            opt = jax.tree.map(moved, self.state_sharding.opt, abstract.opt)
            self.state_sharding = self.state_sharding._replace(opt=opt)

    def _share(self) -> tuple[int, int]:
        """The rows of the global batch that this process feeds.

        Returns:
          (i, n): the process feeds the i-th of n equal parts of the batch's rows.

        Raises:
          UserError: The mesh does not split `train.batch_size` or `data.seq_len` evenly.
        """
        assert self.sharding is not None
        shape = (self.config.train.batch_size, self.config.data.seq_len)
        for size, letter, name in zip(shape, "BT", ("train.batch_size", "data.seq_len"), strict=True):
            axes = self.sharding.activation(letter)[0] or ()
            parts = self.sharding.size((axes,) if isinstance(axes, str) else axes)
            if size % parts:
                raise UserError(f"{name} {size} is not a multiple of the {parts} parts that the mesh splits it into")
        mine = {index[0].indices(shape[0])[:2] for index in self._local_indices(shape)}
        first, last = min(start for start, _ in mine), max(stop for _, stop in mine)
        return first // (last - first), shape[0] // (last - first)

    def _local_indices(self, shape: tuple[int, int]):
        """The index into the global batch of each device of this process."""
        assert self.batch_sharding is not None
        where = self.batch_sharding.devices_indices_map(shape)
        mine = [index for device, index in where.items() if device.process_index == jax.process_index()]
        return mine or list(where.values())  # devices of an ahead-of-time topology belong to no process

    def _state_shardings(self, state: TrainState) -> TrainState:
        """The sharding of every leaf of `state`.

        An optimizer array takes the sharding of the parameter whose name is the last key of its path. Scalars and all
        other leaves are replicated.
        """
        of_params = self._param_sharding
        assert of_params is not None

        def of(path, leaf):
            name = getattr(path[-1], "key", "") if path else ""
            return of_params.get(name, self._replicated) if leaf.ndim else self._replicated

        return jax.tree_util.tree_map_with_path(of, state)

    def _jit(self, function, inputs, outputs, **options):
        """`jax.jit`; on a mesh, the sharding rules are active while the function is traced."""
        if self.sharding is None:
            return jax.jit(function, **options)

        def traced(*args):
            with use_rules(self.sharding):
                return function(*args)

        return jax.jit(traced, in_shardings=inputs, out_shardings=outputs, **options)

    def shard_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """Transfer this process' rows of a batch to its devices.

        Args:
          batch: int32 arrays [rows of this process, T] by name; `process_share` tells which rows.

        Returns:
          The global batch, int32 [B, T] by name, with `batch_sharding`.
        """
        if self.sharding is None:
            return jax.device_put(batch)
        rows, first = self.config.train.batch_size, self.process_share[0] * len(batch["tokens_BT"])
        sharding = self.batch_sharding
        assert sharding is not None

        def array(mine):
            shape = (rows, mine.shape[1])
            local = lambda index: mine[slice(*(i - first for i in index[0].indices(rows)[:2])), index[1]]
            places = sharding.addressable_devices_indices_map(shape).items()
            # Explicit transfers pass the loop's `jax.transfer_guard`; `make_array_from_callback` counts as implicit.
            parts = [jax.device_put(local(index), device) for device, index in places]
            return jax.make_array_from_single_device_arrays(shape, sharding, parts)

        return {name: array(mine) for name, mine in batch.items()}

    def model(self, params: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> Transformer:
        """Merge the arrays, keyed by flat stacked names, into a module."""
        return nnx.merge(self._graph, from_stacked_dict(params, self._params), from_stacked_dict(fixed, self._fixed))

    def init(self) -> TrainState:
        """Initialize the state of step 0; the random key is `train.seed`."""
        return self._jit(self._build, None, self.state_sharding)(jax.random.key(self.config.train.seed))

    def _build(self, key: jax.Array) -> TrainState:
        model = self._new_model(nnx.Rngs(key))
        params, fixed = (to_stacked_dict(tree) for tree in nnx.split(model, nnx.Param, ...)[1:])
        step, guard = jnp.zeros((), jnp.int32), new_guard(self.config.train)
        return TrainState(params, fixed, self._optimizer.init(params), step, guard)

    def abstract(self) -> TrainState:
        """The state as `jax.ShapeDtypeStruct`s, with shardings if there is a mesh; nothing is computed."""
        return _with(jax.eval_shape(self._build, jax.random.key(0)), self.state_sharding)

    def to_tree(self, state: TrainState) -> dict[str, Any]:
        """Convert the state to the tree that a checkpoint holds.

        The model's arrays get per-layer names, so that a run with other stacks or sharding rules can read them. The
        optimizer state keeps its structure.
        """
        return self._tree(state, self._flat)

    def abstract_tree(self) -> dict[str, Any]:
        """`to_tree` of `abstract`; on a mesh, with the shardings that a restored checkpoint must have."""
        tree = jax.eval_shape(lambda state: self._tree(state, self._to_flat), self.abstract())
        if self.sharding is None or self.state_sharding is None:
            return tree
        letters = {name: self._axes.get(self._stacked_name(name), "") for name in tree["model"]}
        shapes = {name: leaf.shape for name, leaf in tree["model"].items()}
        model = self.sharding.parameters(letters, shapes)
        return _with(tree, self._tree(self.state_sharding, lambda *_: model))

    def _tree(self, state: TrainState, flat: Callable) -> dict[str, Any]:
        model, guard = flat(state.params, state.fixed), state.guard
        guard = guard and dict(zip(CHECKPOINT_NAMES, guard, strict=True))
        return {"model": model, "opt": state.opt, "step": state.step, "guard": guard}

    def _stacked_name(self, name: str) -> str:
        """The flat stacked name of the array that holds the per-layer array `name`."""
        head, _, rest = name.partition(".")
        if head != "layers":
            return name
        layer, _, rest = rest.partition(".")
        for i, run in enumerate(self.runs):
            past = int(layer) - run.first
            if past < run.repeats * len(run.pattern):
                return f"stacks.{i}.{past % len(run.pattern)}.{rest}"
        raise ValueError(f"no layer {layer}")

    def _to_flat(self, params: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return to_layer_dict(
            nnx.merge_state(from_stacked_dict(params, self._params), from_stacked_dict(fixed, self._fixed)), self.runs
        )

    def from_tree(self, tree: dict[str, Any]) -> TrainState:
        """The inverse of `to_tree`."""
        if self.sharding is None:
            return self._from_tree(tree)
        return self._jit(self._from_tree, None, self.state_sharding)(tree)

    def _from_tree(self, tree: dict[str, Any]) -> TrainState:
        params, fixed = (
            to_stacked_dict(from_layer_dict(tree["model"], part, self.runs)) for part in (self._params, self._fixed)
        )
        guard = tree["guard"] if "guard" in tree else new_guard(self.config.train)
        if isinstance(guard, dict):
            guard = SpikeGuardState(*(guard[name] for name in CHECKPOINT_NAMES))
        return TrainState(params, fixed, tree["opt"], tree["step"], guard)

    def model_loss(
        self, params: dict[str, jax.Array], fixed: dict[str, jax.Array], batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The training loss of a batch, and its terms (see `train.loss.loss`)."""
        return loss(self.model(params, fixed), batch, self.config.train)

    def _evaluate(self, state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The next-token loss of a batch, summed, and its number of targets (see `train.loss.heldout_nll`)."""
        return heldout_nll(self.model(state.params, state.fixed), batch)

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimizer step.

        Returns:
          The state after the step, and its metrics by name (scalars).
        """
        if "optimizer" in self.config.train.offload:  # the output sharding moves the new state back to the host
            state = state._replace(opt=jax.device_put(state.opt, jax.memory.Space.Device))
        objective = lambda params: self.model_loss(params, state.fixed, batch)
        (_, parts), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt = self._optimizer.update(grads, state.opt, state.params)
        loads = parts.pop("load_E")
        fixed = {name: self._balanced(name, array, loads) for name, array in state.fixed.items()}
        metrics = parts | {"grad_norm": optax.tree.norm(grads), "max_load": jnp.max(loads.max(1) / loads.mean(1))}
        params, guard = cast("dict[str, jax.Array]", optax.apply_updates(state.params, updates)), state.guard
        updated = state.step if guard is None else state.step - guard.skipped  # skipped steps do not advance a schedule
        metrics |= {name: rate(updated) for name, rate in self._rates.items()}
        if guard is not None:
            good, guard = check_step(guard, metrics["loss"], metrics["grad_norm"], self.config.train.spike_factor)
            old = state.params, state.fixed, state.opt
            params, fixed, opt = select_state(good, (params, fixed, opt), old)
            metrics |= {"skipped": guard.skipped, "skipped_row": guard.consecutive_skips}
        return TrainState(params, fixed, opt, state.step + 1, guard), metrics

    def _finite(self, state: TrainState) -> jax.Array:
        """Whether all parameters, buffers and optimizer arrays are finite: bool scalar."""
        leaves = jax.tree.leaves((state.params, state.fixed, state.opt))
        leaves = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
        if "optimizer" in self.config.train.offload:
            leaves = jax.device_put(leaves, jax.memory.Space.Device)
        return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))

    def _balanced(self, name: str, array: jax.Array, loads_E: jax.Array) -> jax.Array:
        if not name.endswith("router.bias"):
            return array
        layers = layers_of(name, self.runs)
        load = loads_E[-1] if layers is None else loads_E[jnp.array(layers)].reshape(array.shape)
        return update_bias(array, load, self.config.train.bias_update_speed)


def _with(tree, shardings):
    """Add shardings to a tree of `jax.ShapeDtypeStruct`s; `shardings=None` returns the tree unchanged."""
    if shardings is None:
        return tree
    abstract = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(abstract, tree, shardings)
