"""Suite `generate`: time to first token and time per output token, without prefix-cache hits."""

from __future__ import annotations

import dataclasses
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence

import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import Progress

from v4jax.config import Config, Model
from v4jax.core.errors import UserError
from v4jax.core.reporting import print_table
from v4jax.models.transformer import Transformer
from v4jax.serve.engine import Engine
from v4jax.serve.sampling_params import SamplingParams
from v4jax.tools.bench.measure import interleave
from v4jax.tools.bench.report import record

CONTEXTS = (256, 1024, 4096, 16_384)
DECODED = 257  # the first token, whose time is the prefill's, and 256 more


def run(config: Config, rounds: int, contexts: Sequence[int] = CONTEXTS) -> list[dict]:
    """Time requests one by one for each prompt length, print a table and return its records.

    The model has random weights, prefix caching is off, and every prompt is new. Lengths are measured in turn. The
    record `peak_memory` is the resident memory of the whole process.

    Args:
      config: Model, engine and cache.
      rounds: Measurements of each length.
      contexts: Prompt lengths in tokens.

    Raises:
      UserError: A length cannot be measured.
    """
    contexts = sorted(set(contexts))
    most = config.model.max_position_embeddings - DECODED
    if not contexts or not 0 < contexts[0] <= contexts[-1] <= most:
        raise UserError(f"suite 'generate' needs contexts from 1 to {most} tokens; give them as --contexts=256,1024")
    model = dataclasses.replace(config.model, num_nextn_predict_layers=0)
    limits = dict(max_num_seqs=1, max_model_len=contexts[-1] + DECODED, num_speculative_tokens=0)
    serve, cache = (
        dataclasses.replace(config.serve, **limits),
        dataclasses.replace(config.cache, enable_prefix_caching=False),
    )
    engine = Engine(_random(model), serve, cache)
    rng = np.random.default_rng(0)

    def request(length: int):
        return lambda: _times(engine, rng.integers(2, model.vocab_size, length).tolist())

    chunk = serve.max_num_batched_tokens
    for length in contexts:  # compiles the program of each chunk size: whole chunks and the rest
        request(min(length, 2 * chunk + length % chunk))()
    taken = interleave({length: request(length) for length in contexts}, rounds)
    return _report(config, taken)


def _random(model: Model) -> Transformer:
    return Transformer(model, nnx.Rngs(0))


def _times(engine: Engine, prompt: list[int]) -> tuple[float, float]:
    """Return the seconds to the first token, and the mean seconds per token after it."""
    start, stamps = time.perf_counter(), []
    engine.add_request("request", prompt, SamplingParams(max_tokens=DECODED, temperature=0.0))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        read = progress.add_task(
            f"{len(prompt):,} tokens", total=-(-len(prompt) // engine.limits.max_num_batched_tokens)
        )
        while engine.busy:
            drawn = engine.step()
            stamps += [time.perf_counter()] * len(drawn)
            progress.advance(read)
    return stamps[0] - start, (stamps[-1] - stamps[0]) / (len(stamps) - 1)


def _report(config: Config, taken: dict[int, list[tuple[float, float]]]) -> list[dict]:
    at = {"config": config.name, "concurrency": 1, "precision": config.cache.kv_cache_dtype}
    rows, records = [], []
    for length, times in taken.items():
        first, later = [a for a, _ in times], [1e3 * b for _, b in times]
        speed = [length / a for a in first]
        rows.append(
            [
                f"{length:,}",
                f"{statistics.median(first):.3g}",
                f"{statistics.median(speed):,.0f}",
                f"{statistics.median(later):.2f}",
            ]
        )
        where = at | {"context": length}
        records += [
            record("generate", "prefill_time", first, "s", **where),
            record("generate", "prefill_tokens_per_second", speed, "1/s", **where),
            record("generate", "decode_time", later, "ms", **where),
        ]
    what = f"{config.name}, {config.model.dtype}, kv_cache_dtype {config.cache.kv_cache_dtype}"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records.append(record("generate", "peak_memory", [peak], "B", **at, context=max(taken)))
    title = f"{what}: one request at a time, {os.cpu_count()} CPU threads, {peak / 2**30:.2f} GiB resident at most"
    print_table(title, ["prompt", "s to the first token", "prompt tokens/s", "ms a token after it"], rows)
    return records
