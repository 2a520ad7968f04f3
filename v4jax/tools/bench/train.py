"""Suite `train`: time of the parts of a training step, and the cost of each training option against the plain step."""

from __future__ import annotations

import dataclasses
import os
import statistics

import jax
import numpy as np

from v4jax.config import Config, Mesh
from v4jax.core.reporting import print_table
from v4jax.models.param_count import count_parameters
from v4jax.tools.bench.measure import interleave, machine, relative_iqr, timed
from v4jax.tools.bench.report import record
from v4jax.train.loss import loss
from v4jax.train.trainer import Trainer


def run(config: Config, rounds: int) -> list[dict]:
    """Time a training step, its loss, and loss with gradients, then the step with each of `options`.

    Prints two tables, tokens per second and the rate of matmul operations, and returns the records.
    """
    at = {
        "config": config.name,
        "context": config.data.seq_len,
        "concurrency": config.train.batch_size,
        "precision": config.model.dtype,
    }
    return _parts(config, rounds, at) + _options(config, rounds, at)


def _parts(config: Config, rounds: int, at: dict) -> list[dict]:
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
    limits, taken = machine(), interleave(arms, rounds)
    median = {name: statistics.median(values) for name, values in taken.items()}
    # Two operations per parameter and token forward, twice as many backward; attention over the context is omitted.
    flops = 6 * count_parameters(config.model).active * rows * length
    rate = flops / median["loss and gradients"]
    table = [[name, f"{value:.3f} s", f"{value / median['whole step']:.0%}"] for name, value in median.items()]
    print_table(
        f"{config.name}, {rows} x {length} tokens, {os.cpu_count()} CPU threads", ["part", "time", "of the step"], table
    )
    peak = limits["flops_per_second"]
    print(
        f"{rows * length / median['whole step']:,.0f} tokens/s; products at {rate / 1e9:.0f} GFLOP/s, "
        f"{rate / peak:.0%} of this machine's {peak / 1e9:.0f}"
    )
    records = [record("train", "time", values, "s", part=name, **at) for name, values in taken.items()]
    speeds = [rows * length / value for value in taken["whole step"]]
    return [
        *records,
        record("train", "tokens_per_second", speeds, "1/s", **at),
        record("train", "flops_per_second", [rate], "1/s", **at),
    ]


def options(config: Config) -> dict[str, Config]:
    """Return the config without training options, then with one option at a time; a mesh has one device."""
    train, alone, mesh = config.train, Mesh(), Mesh(rules="fsdp")
    bare = dict(remat=False, offload=(), matmul_precision="plain", expert_weight_format="plain", spike_action="off")
    made = lambda mesh=alone, **changes: dataclasses.replace(
        config, mesh=mesh, train=dataclasses.replace(train, **bare | changes)
    )
    ways = {
        "plain": made(),
        "sharded, one device": made(mesh),
        "spike guard": made(spike_action="skip"),
        "remat": made(remat=True),
        "optimizer in host memory": made(mesh, offload=("optimizer",)),
        "remat, streams in host memory": made(mesh, remat=True, offload=("streams",)),
        "fp8 products": made(matmul_precision="fp8"),
    }
    if config.model.hidden_size % 32 == config.model.moe.moe_intermediate_size % 32 == 0:
        ways["mxfp4 experts"] = made(expert_weight_format="mxfp4")
    return ways


def _options(config: Config, rounds: int, at: dict) -> list[dict]:
    """Time steps of the configs of `options` in turn, from equal initial states."""
    tokens = np.random.default_rng(0).integers(
        2, config.model.vocab_size, (config.train.batch_size, config.data.seq_len + 1)
    )
    batch = jax.device_get(as_batch(tokens))

    def arm(way):
        trainer = Trainer(way, devices=jax.devices()[:1])
        state, placed = trainer.init(), trainer.shard_batch(batch)

        def step():
            nonlocal state
            state, metrics = trainer.step(state, placed)
            return metrics

        step()
        return lambda: timed(step)

    taken = interleave({name: arm(way) for name, way in options(config).items()}, rounds)
    ratios = {name: [a / b for a, b in zip(values, taken["plain"], strict=True)] for name, values in taken.items()}
    table = [
        [
            name,
            f"{statistics.median(taken[name]):.3f} s",
            f"{statistics.median(ratios[name]):.2f}",
            f"{relative_iqr(ratios[name]):.0%}",
        ]
        for name in ratios
    ]
    header = ["step", "time", "ratio", "spread"]
    print_table(f"{config.name}: a step, and its time against the plain one", header, table)
    return [record("train", "step_ratio", values, "1", option=name, **at) for name, values in ratios.items()]


def as_batch(tokens: np.ndarray) -> dict[str, jax.Array]:
    """Convert rows of T + 1 tokens to a training batch with one document per row."""
    ids = tokens[:, :-1].astype(np.int32)
    positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (len(ids), 1))
    batch = {
        "tokens_BT": ids,
        "targets_BT": tokens[:, 1:].astype(np.int32),
        "targets2_BT": np.pad(tokens[:, 2:], ((0, 0), (0, 1)), constant_values=-1).astype(np.int32),
        "segments_BT": np.ones_like(ids),
        "positions_BT": positions,
    }
    return jax.device_put(batch)
