"""The v4jax side of suite `vs_transformers`."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from v4jax import checkpoint
from v4jax.config import Config
from v4jax.models.layer_stacks import to_stacked_dict
from v4jax.serve.engine import Engine
from v4jax.serve.sampling_params import SamplingParams
from v4jax.tools.bench import measure
from v4jax.tools.bench.train import as_batch
from v4jax.train.trainer import Trainer, TrainState


class V4JaxRunner:
    """The model with random weights, which it writes to `directory` in Hugging Face format and reads back."""

    def __init__(self, config: Config, directory: str):
        others = dict(balance_loss_weight=0.0, indexer_loss_weight=0.0, mtp_loss_weight=0.0)
        train = dataclasses.replace(config.train, **others)
        self._optimizer = optax.adamw(1e-4)
        self._trainer = Trainer(dataclasses.replace(config, train=train), self._optimizer)
        state = self._trainer.init()
        checkpoint.save(self._trainer.model(state.params, state.fixed), directory, format="huggingface")
        self._model = checkpoint.load(directory, scan=config.train.scan)
        self._engine = Engine(self._model, config.serve, config.cache)

    def machine(self) -> dict[str, float]:
        """Return the machine's peak rates (`measure.machine`)."""
        return measure.machine()

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Return float32 logits [B, T, V]."""
        return np.asarray(self._model(tokens_BT))

    def generate(self, prompt: list[int], count: int) -> tuple[float, float]:
        """Generate greedily with the engine of `LLM`; return seconds to the first token and per token after it."""
        start, stamps = time.perf_counter(), []
        self._engine.add_request("request", prompt, SamplingParams(max_tokens=count, temperature=0.0))
        while self._engine.busy:
            tokens = self._engine.step()
            stamps += [time.perf_counter()] * len(tokens)
        return stamps[0] - start, (stamps[-1] - stamps[0]) / (len(stamps) - 1)

    def prepare_training(self, tokens_BT: np.ndarray) -> None:
        """Prepare `step` for rows of T + 1 tokens, and move the weights there; only `step` works after this."""
        params, fixed = (to_stacked_dict(part) for part in nnx.split(self._model, nnx.Param, ...)[1:])
        opt = jax.jit(self._optimizer.init)(params)
        self._state, self._batch = TrainState(params, fixed, opt, jnp.zeros((), jnp.int32)), as_batch(tokens_BT)
        del self._model, self._engine

    def step(self) -> float:
        """Return the seconds of one training step."""
        start = time.perf_counter()
        self._state, metrics = self._trainer.step(self._state, self._batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start
