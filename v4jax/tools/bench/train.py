"""Where a training step's time goes: forward, backward, optimizer."""

from __future__ import annotations

import os
import statistics

import jax
import numpy as np

from v4jax.config import Config
from v4jax.core.tables import print_table
from v4jax.models.flops import count_parameters
from v4jax.tools.bench.measure import alternate, machine, timed
from v4jax.tools.bench.report import record
from v4jax.train.loss import loss
from v4jax.train.state import Trainer


def run(config: Config, rounds: int) -> list[dict]:
    """Time of the whole step of `config`, of its loss, and of loss with gradients; tokens a second and product rate."""
    trainer = Trainer(config)
    rows, length = config.train.batch_size, config.data.seq_len
    batch = as_batch(np.random.default_rng(0).integers(2, config.model.vocab_size, (rows, length + 1)))
    state = trainer.init()
    objective = lambda params, fixed, batch: loss(trainer.model(params, fixed), batch, config.train)[0]
    forward, gradient = jax.jit(objective), jax.jit(jax.grad(objective))

    def step():
        nonlocal state
        state, metrics = trainer.step(state, batch)
        return metrics

    arms = {
        "loss": lambda: timed(lambda: forward(state.params, state.fixed, batch)),
        "loss and gradients": lambda: timed(lambda: gradient(state.params, state.fixed, batch)),
        "whole step": lambda: timed(step),
    }
    for arm in arms.values():
        arm()
    limits, taken = machine(), alternate(arms, rounds)
    median = {name: statistics.median(values) for name, values in taken.items()}
    # Two operations a parameter and token forward, twice that backward; attention over the context is left out.
    flops = 6 * count_parameters(config.model).active * rows * length
    rate = flops / median["loss and gradients"]
    table = [[name, f"{value:.3f} s", f"{value / median['whole step']:.0%}"] for name, value in median.items()]
    print_table(
        f"{config.name}, {rows} x {length} tokens, {os.cpu_count()} CPU threads", ["part", "time", "of the step"], table
    )
    peak = limits["flops_per_second"]
    print(f"{rows * length / median['whole step']:,.0f} tokens/s; products at {rate / 1e9:.0f} GFLOP/s, "
          f"{rate / peak:.0%} of this machine's {peak / 1e9:.0f}")  # fmt: skip
    at = {"config": config.name, "context": length, "concurrency": rows, "precision": config.model.dtype}
    records = [record("train", "time", values, "s", part=name, **at) for name, values in taken.items()]
    speeds = [rows * length / value for value in taken["whole step"]]
    return [
        *records,
        record("train", "tokens_per_second", speeds, "1/s", **at),
        record("train", "flops_per_second", [rate], "1/s", **at),
    ]


def as_batch(tokens: np.ndarray) -> dict[str, jax.Array]:
    """Rows of T + 1 tokens as a training batch of one document a row."""
    ids = tokens[:, :-1].astype(np.int32)
    positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))
    batch = {
        "tokens_BT": ids, "targets_BT": tokens[:, 1:].astype(np.int32),
        "targets2_BT": np.pad(tokens[:, 2:], ((0, 0), (0, 1)), constant_values=-1).astype(np.int32),
        "segments_BT": np.ones_like(ids), "positions_BT": positions,
    }  # fmt: skip
    return jax.device_put(batch)
