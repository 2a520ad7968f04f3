"""Training state and the compiled step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from v4jax.config import Config
from v4jax.models.layout import from_flat, layers_of, named, rebuild, to_flat
from v4jax.models.transformer import Transformer
from v4jax.train.loss import Batch, heldout_nll, loss
from v4jax.train.optim import make_optimizer, update_bias


class TrainState(NamedTuple):
    """Everything a step changes, as pytrees of arrays keyed by `models.layout.named` names."""

    params: dict[str, jax.Array]
    fixed: dict[str, jax.Array]  # router biases and hash tables
    opt: Any
    step: jax.Array  # int32 scalar: steps done


class Trainer:
    """The parts of a run that do not change: model structure, optimizer and compiled functions."""

    def __init__(self, config: Config, optimizer: optax.GradientTransformation | None = None):
        self.config = config
        abstract = nnx.eval_shape(lambda: Transformer(config.model, nnx.Rngs(0), config.train.scan))
        self.runs = abstract.runs
        self._graph, self._params, self._fixed = nnx.split(abstract, nnx.Param, ...)
        letters = {".".join(map(str, path)): leaf.letters for path, leaf in nnx.to_flat_state(self._params)}
        self._optimizer = optimizer or make_optimizer(config.train, letters)
        self.step = jax.jit(self._step, donate_argnums=0)
        # Taking stacks apart is work for the device; without stacks it only renames, and a jit would copy everything.
        self._flat = jax.jit(self._to_flat) if config.train.scan else self._to_flat
        self.evaluate = jax.jit(lambda state, batch: heldout_nll(self.model(state.params, state.fixed), batch))

    def model(self, params: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> Transformer:
        """The module with these arrays in it."""
        return nnx.merge(self._graph, rebuild(params, self._params), rebuild(fixed, self._fixed))

    def init(self) -> TrainState:
        """State before the first step, drawn from `train.seed`."""

        def build(key):
            model = Transformer(self.config.model, nnx.Rngs(key), self.config.train.scan)
            params, fixed = (named(tree) for tree in nnx.split(model, nnx.Param, ...)[1:])
            return TrainState(params, fixed, self._optimizer.init(params), jnp.zeros((), jnp.int32))

        return jax.jit(build)(jax.random.key(self.config.train.seed))

    def abstract(self) -> TrainState:
        """Shapes and dtypes of the state, nothing computed."""
        return jax.eval_shape(self.init)

    def to_tree(self, state: TrainState) -> dict[str, Any]:
        """What a checkpoint holds: the model under its per-layer names (any layout reads it), the rest as it is."""
        return {"model": self._flat(state.params, state.fixed), "opt": state.opt, "step": state.step}

    def _to_flat(self, params: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return to_flat(nnx.merge_state(rebuild(params, self._params), rebuild(fixed, self._fixed)), self.runs)

    def from_tree(self, tree: dict[str, Any]) -> TrainState:
        """The inverse of `to_tree`."""
        params, fixed = (named(from_flat(tree["model"], part, self.runs)) for part in (self._params, self._fixed))
        return TrainState(params, fixed, tree["opt"], tree["step"])

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        train = self.config.train
        objective = lambda params: loss(self.model(params, state.fixed), batch, train)
        (_, parts), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt = self._optimizer.update(grads, state.opt, state.params)
        loads = parts.pop("load_E")
        fixed = {name: self._balanced(name, array, loads) for name, array in state.fixed.items()}
        metrics = parts | {"grad_norm": optax.tree.norm(grads), "max_load": jnp.max(loads.max(1) / loads.mean(1))}
        return TrainState(optax.apply_updates(state.params, updates), fixed, opt, state.step + 1), metrics

    def _balanced(self, name: str, array: jax.Array, loads_E: jax.Array) -> jax.Array:
        if not name.endswith("router.bias"):
            return array
        layers = layers_of(name, self.runs)
        load = loads_E[-1] if layers is None else loads_E[jnp.array(layers)].reshape(array.shape)
        return update_bias(array, load, self.config.train.bias_rate)
