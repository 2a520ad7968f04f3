"""v4jax against transformers: same weights, same tokens, same machine, in turn."""

from __future__ import annotations

import dataclasses
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
from flax import nnx

from v4jax import checkpoint
from v4jax.config import Config
from v4jax.core.check import UserError
from v4jax.core.tables import print_table
from v4jax.models.transformer import Transformer
from v4jax.serve.engine import Engine, Request
from v4jax.serve.sampling import SamplingParams
from v4jax.tools.bench.measure import alternate, machine
from v4jax.tools.bench.report import record
from v4jax.train.state import Trainer

PREFILL, DECODED, ROWS = (2048, 8192), 32, 4
OURS, THEIRS = "v4jax", "transformers"


def run(config: Config, rounds: int) -> list[dict]:
    """Training step, prefill and decode of `config.model` in float32; prints a table of ratios.

    Both train with AdamW on all parameters, cross-entropy alone; both prefill whole prompts and decode greedily with
    their caches. Times are medians of `rounds` rounds, the long prefill of at most 2.
    """
    torch, auto = _transformers()
    torch.set_num_threads(os.cpu_count())
    model_config = dataclasses.replace(config.model, dtype="float32", mtp_layers=0, kv_qdq=False)
    config = dataclasses.replace(config, model=model_config)
    model = Transformer(model_config, nnx.Rngs(0))
    with tempfile.TemporaryDirectory() as directory:
        checkpoint.save(model, directory, format="huggingface")
        theirs = auto.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(2, model_config.vocab_size, (ROWS, max(PREFILL)))
    difference = _difference(model, theirs, tokens[:1, :256], torch)
    limits = machine()
    print(f"largest logit difference {difference:.1e} of the logit spread; this machine: "
          f"{limits['flops_per_second'] / 1e9:.0f} GFLOP/s, {limits['bytes_per_second'] / 1e9:.0f} GB/s")  # fmt: skip
    seconds: dict[tuple[str, int], dict[str, list[float]]] = {}
    engine = Engine(model, dataclasses.replace(config.serve, max_batch=1, max_seq_len=2 * max(PREFILL)))
    for length in PREFILL:
        prompt = tokens[0, :length].tolist()
        arms = {OURS: _our_generation(engine, prompt), THEIRS: _their_generation(theirs, prompt, torch)}
        if length == min(PREFILL):
            for arm in arms.values():
                arm()
        else:
            arms[OURS]()
        taken = alternate(arms, rounds if length == min(PREFILL) else min(rounds, 2))
        seconds["prefill", length] = {name: [prefill for prefill, _ in values] for name, values in taken.items()}
        seconds["decode", length] = {name: [decode for _, decode in values] for name, values in taken.items()}
    del engine
    length = config.data.seq_len
    arms = {
        OURS: _our_step(config, tokens[:, : length + 1]),
        THEIRS: _their_step(theirs, tokens[:, : length + 1], torch),
    }
    for arm in arms.values():
        arm()
    seconds["train", length] = alternate(arms, rounds)
    return _report(config, seconds, limits)


def _report(config: Config, seconds, limits) -> list[dict]:
    rows, records = [], []
    for (what, length), taken in seconds.items():
        scale, unit = {"train": (1, "s"), "prefill": (1, "s"), "decode": (1e3, "ms")}[what]
        median = {name: statistics.median(values) * scale for name, values in taken.items()}
        ratios = [theirs / ours for ours, theirs in zip(taken[OURS], taken[THEIRS], strict=True)]
        rows.append(
            [
                what,
                length,
                f"{median[OURS]:.3g} {unit}",
                f"{median[THEIRS]:.3g} {unit}",
                f"{statistics.median(ratios):.1f}x",
            ]
        )
        at = {
            "config": config.name,
            "context": length,
            "concurrency": ROWS if what == "train" else 1,
            "precision": "float32",
        }
        for name, values in taken.items():
            records.append(record("peer", f"{what}_time", [v * scale for v in values], unit, arm=name, **at))
        records.append(record("peer", f"{what}_speedup", ratios, "ratio", arm=f"{THEIRS}/{OURS}", **at))
    for name, value in limits.items():
        records.append(record("peer", name, [value], name.split("_")[0] + "/s", config="machine"))
    print_table(
        f"{config.name}, float32, {os.cpu_count()} CPU threads", ["what", "tokens", OURS, THEIRS, "speed-up"], rows
    )
    return records


def _transformers():
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"suite 'peer' needs torch and transformers ({error}); install them beside v4jax") from error
    return torch, AutoModelForCausalLM


def _difference(model: Transformer, theirs, tokens_BT: np.ndarray, torch) -> float:
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens_BT)).logits.numpy()
    return float(np.abs(np.asarray(model(tokens_BT)) - reference).max() / reference.std())


def _our_generation(engine: Engine, prompt: list[int]) -> Callable[[], tuple[float, float]]:
    """Seconds to the first token, and a token after it, through the engine that `LLM` runs."""
    request = Request(prompt, SamplingParams(max_tokens=DECODED, temperature=0.0))

    def generate():
        start = time.perf_counter()
        stamps = [time.perf_counter() for _ in engine.run([request])]
        return stamps[0] - start, (stamps[-1] - stamps[0]) / (len(stamps) - 1)

    return generate


def _their_generation(theirs, prompt: list[int], torch) -> Callable[[], tuple[float, float]]:
    def generate():
        gc.collect()
        with torch.inference_mode():
            start = time.perf_counter()
            out = theirs(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            stamps = []
            for _ in range(DECODED):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                stamps.append(time.perf_counter())
                out = theirs(token, past_key_values=out.past_key_values, use_cache=True)
        return stamps[0] - start, (stamps[-1] - stamps[0]) / (len(stamps) - 1)

    return generate


def _our_step(config: Config, tokens: np.ndarray) -> Callable[[], float]:
    train = dataclasses.replace(config.train, balance_weight=0.0, indexer_weight=0.0, mtp_weight=0.0)
    trainer = Trainer(dataclasses.replace(config, train=train), optax.adamw(1e-4))
    batch = as_batch(tokens)
    state = trainer.init()

    def step():
        nonlocal state
        start = time.perf_counter()
        state, metrics = trainer.step(state, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    return step


def _their_step(theirs, tokens: np.ndarray, torch) -> Callable[[], float]:
    optimizer, ids = torch.optim.AdamW(theirs.parameters(), 1e-4), torch.tensor(tokens)
    theirs.train()

    def step():
        start = time.perf_counter()
        logits = theirs(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


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
