"""Suite `decode`: time of a decode step by context, with dense or sparse attention and a bfloat16 or FP8 KV cache.

All variants share weights and forced tokens, and variants of one KV layout share the cache. A dense variant is the same
model with an `index_topk` beyond its context: it attends every compressed entry, in pieces. Its indexer still stores
its keys but searches nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from v4jax.cache.allocate import allocate_layer
from v4jax.cache.entry_pool import EntryPool
from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.cache.paged_cache import PagedLayerCache
from v4jax.config import Config, Model
from v4jax.core.errors import UserError
from v4jax.core.reporting import print_table
from v4jax.models.quantize import quantize_model
from v4jax.models.transformer import Transformer
from v4jax.parallel.host_memory import is_host
from v4jax.serve import model_steps
from v4jax.serve.model_steps import DecodeState, KVCaches
from v4jax.tools.bench.measure import interleave, timed
from v4jax.tools.bench.report import record, short, write

ARMS = {
    "A0": ("dense", "bf16"),
    "A1": ("sparse", "bf16"),
    "A2": ("dense", "fp8"),
    "A3": ("sparse", "fp8"),
    "A3'": ("sparse", "fp8"),
}
WEIGHTS = {"A4": ("sparse", "fp8")}  # with serve.quantization=fp8: A3 with weights in 8 bits too
CONTEXTS = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
STEPS = 16  # decode steps of a measurement, the last ones of the context
_ARM, _CONTROL, _TOLERANCE = "A3", "A3'", 0.05
_SPEEDUPS = (("A3", "A0"), ("A1", "A0"), ("A2", "A0"), ("A3", "A1"), ("A4", "A3"))
_QUALITY = (("A3", "A1"), ("A2", "A0"), ("A4", "A3"))  # pairs that differ in the layout, or the weights, alone
_GROWTH_FROM = 4096
_AT_ONCE = 64  # blocks filled at once
_RECORD = 1  # state slot of the single row; the engine uses slot 0 for padding rows


def run(config: Config, rounds: int, contexts: Sequence[int] = CONTEXTS, plot: str | None = None) -> list[dict]:
    """Time a decode step of one sequence by arm and context, print tables and return their records.

    Arms of one KV layout share one cache of the longest context, with random entries. Arms and contexts are measured in
    turn.

    Args:
      config: Model and weight quantization.
      rounds: Measurements of each arm and context.
      contexts: Contexts in tokens.
      plot: PNG file to draw; None draws nothing.

    Raises:
      UserError: A context cannot be measured, or the model has no CSA layers.
    """
    model = dataclasses.replace(config.model, num_nextn_predict_layers=0, kv_qdq=False)
    contexts = _checked(model, contexts)
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    arms = _arms(model, max(contexts), config.serve.quantization)
    tokens = np.random.default_rng(0).integers(2, model.vocab_size, STEPS + 1)
    cells, quality = {}, {}
    for context in contexts:
        heads = [_heads(token, context - STEPS - 1 + i) for i, token in enumerate(tokens)]
        quality[context] = _quality(arms, heads)
        cells |= {(context, name): functools.partial(arm.seconds, heads) for name, arm in arms.items()}
    seconds = interleave(cells, rounds)
    return _report(config.name, model, contexts, seconds, quality, load, plot)


def _checked(model: Model, contexts: Sequence[int]) -> list[int]:
    if "csa" not in model.layer_types:
        raise UserError("suite 'decode' compares dense with sparse attention, and this model has no csa layer")
    for context in contexts:
        if not STEPS < context <= model.max_position_embeddings:
            raise UserError(
                f"context {context} cannot be measured; take {STEPS + 1} to "
                f"model.max_position_embeddings {model.max_position_embeddings}"
            )
    if not contexts:
        raise UserError("no contexts to measure; give at least one")
    return sorted(set(contexts))


# --- arms ----------------------------------------------------------------------------------------------------------


class _Cache:
    """A cache of one layout, with entries for `tokens` tokens of one sequence."""

    def __init__(self, model: Model, layout: str, tokens: int):
        sizes = KVCacheSpec(model, layout)
        blocks = -(-tokens // sizes.block_size)
        layers = [allocate_layer(sizes, kind, blocks + 1, _RECORD + 1) for kind in model.layer_types]
        layers = [filled(kept, np.random.default_rng(i)) for i, kept in enumerate(layers)]
        self.live = KVCaches([[layer] for layer in layers], None)
        block_table_ZA = np.full((_RECORD + 1, blocks), -1, np.int32)
        block_table_ZA[_RECORD] = 1 + np.arange(blocks)  # in order, as the engine gives them to a lone sequence
        self.rows = jax.device_put((np.array([_RECORD], np.int32), block_table_ZA))


def filled(kept: PagedLayerCache, rng: np.random.Generator) -> PagedLayerCache:
    """Fill a layer's cache with normal numbers of variance 1, that of normalized entries; equal in every layout."""

    def fill(pool: EntryPool | None) -> EntryPool | None:
        pages, slots, width = pool.shape if pool else (0, 0, 0)
        for first in range(0, pages, _AT_ONCE):  # `write` drops blocks beyond the last
            rows = rng.standard_normal((_AT_ONCE, slots, width), np.float32)
            page = np.arange(first, first + _AT_ONCE, dtype=np.int32)[:, None]
            pool = _write(pool, page, np.arange(slots, dtype=np.int32)[None], rows)
        return pool

    where = lambda a: a.sharding if is_host(a) else None
    kept = kept.map_state(lambda a: jax.device_put(rng.standard_normal(a.shape, np.float32).astype(a.dtype), where(a)))
    return dataclasses.replace(kept, entries=fill(kept.entries), index_keys=fill(kept.index_keys))


@functools.partial(jax.jit, donate_argnums=0)
def _write(pool: EntryPool, page: np.ndarray, slot: np.ndarray, rows: np.ndarray) -> EntryPool:
    return pool.write(page, slot, rows)


@dataclasses.dataclass(frozen=True)
class _Arm:
    """The engine's decode program with the weights and the cache that it runs on."""

    structure: object
    weights: list[jax.Array]
    cache: _Cache

    def seconds(self, heads: list[DecodeState]) -> float:
        """Return the median seconds of a step, without the first.

        The first step refills the CPU's caches after the arm before it. Each step is timed and waited for by itself, as
        an engine waits for its token, so that a disturbance of the machine affects few of them.
        """
        first, *others = heads
        jax.block_until_ready(self._step(first))
        return statistics.median(timed(lambda each=each: self._step(each)) for each in others)

    def _step(self, heads: DecodeState) -> jax.Array:
        args = (self.structure, self.weights, self.cache.live, heads, self.cache.rows, False)
        self.cache.live, _, logits_BTV = model_steps.decode(*args)
        return logits_BTV


def _random(model: Model) -> Transformer:
    return Transformer(model, nnx.Rngs(0))


def _arms(model: Model, tokens: int, precision: str) -> dict[str, _Arm]:
    everything = dataclasses.replace(model.indexer, index_topk=model.max_position_embeddings)
    kinds = {"sparse": model, "dense": dataclasses.replace(model, indexer=everything)}
    transformer = _random(model)
    weights = jax.tree.leaves(nnx.split(transformer)[1])
    structures = {}
    for kind, each in kinds.items():
        graphdef, variables = nnx.split(nnx.eval_shape(lambda each=each: Transformer(each, nnx.Rngs(0))))
        structures[kind] = model_steps.model_def(graphdef, jax.tree.structure(variables))
    caches = {layout: _Cache(model, layout, tokens) for layout in dict.fromkeys(layout for _, layout in ARMS.values())}
    arms = {name: _Arm(structures[kind], weights, caches[layout]) for name, (kind, layout) in ARMS.items()}
    if precision == "fp8":
        graphdef, variables = nnx.split(quantize_model(transformer))
        weights, tree = jax.tree.flatten(variables)
        structure = model_steps.model_def(graphdef, tree)
        arms |= {name: _Arm(structure, weights, caches[layout]) for name, (_, layout) in WEIGHTS.items()}
    return arms


def _heads(token: int, position: int) -> DecodeState:
    each = lambda value: np.full(_RECORD + 1, value, np.int32)
    return jax.device_put(DecodeState(each(token), each(position), np.zeros((_RECORD + 1, 0), np.int32)))


# --- report --------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the median."""
    samples = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.percentile(np.median(samples, axis=1), [2.5, 97.5])
    return float(low), float(high)


def fit(contexts: Sequence[int], times: Sequence[float]) -> tuple[float, float]:
    """Fit time = a + b * context to (a, b) by least squares of relative errors, because timing errors are relative."""
    slope, fixed = np.polyfit(contexts, times, 1, w=1 / np.asarray(times))
    return float(fixed), float(slope)


def _quality(arms: dict[str, _Arm], heads: list[DecodeState]) -> dict[tuple[str, str], tuple[float, float]]:
    """Return KL(second || first) of each pair in nats, averaged over the steps, and the share of equal tokens."""
    pairs = [pair for pair in _QUALITY if {*pair} <= {*arms}]
    out, names = {}, dict.fromkeys(name for pair in pairs for name in pair)
    read = lambda name: [jax.nn.log_softmax(arms[name]._step(each)[0]) for each in heads]
    log_p = {name: np.concatenate(read(name)) for name in names}
    for one, other in pairs:
        kl = np.sum(np.exp(log_p[other]) * (log_p[other] - log_p[one]), axis=-1)
        out[one, other] = float(kl.mean()), float(np.mean(log_p[one].argmax(-1) == log_p[other].argmax(-1)))
    return out


def _report(
    name: str, model: Model, contexts: list[int], seconds, quality, load: float | None, plot: str | None
) -> list[dict]:
    ms = {cell: [1e3 * value for value in values] for cell, values in seconds.items()}
    middle = {cell: statistics.median(values) for cell, values in ms.items()}
    bounds = {cell: interval(values) for cell, values in ms.items()}
    at = {"config": name, "concurrency": 1}
    records, rows, arms = [], [], _measured(middle)
    speedups, pairs = ([pair for pair in all if {*pair} <= {*arms}] for all in (_SPEEDUPS, _QUALITY))
    for context in contexts:
        row = [f"{context:,}"]
        for arm, (_, layout) in arms.items():
            low, high = bounds[context, arm]
            row.append(f"{middle[context, arm]:.2f} [{low:.2f}, {high:.2f}]")
            where = at | {"arm": arm, "context": context, "precision": layout, "low": low, "high": high, "load": load}
            records.append(record("decode", "decode_time", ms[context, arm], "ms", **where))
        for fast, slow in speedups:
            ratios = _ratios(ms, context, fast, slow)
            (low, high), where = interval(ratios), at | {"arm": f"{fast}/{slow}", "context": context}
            row.append(f"{statistics.median(ratios):.2f}x")
            records.append(record("decode", "decode_speedup", ratios, "ratio", low=low, high=high, **where))
        for one, other in pairs:
            (kl, same), where = quality[context][one, other], at | {"arm": f"{one}/{other}", "context": context}
            row.append(f"{kl:.1e}, {same:.0%}")
            records.append(record("decode", "decode_kl", [kl], "nats", **where))
            records.append(record("decode", "decode_same_token", [same], "share", **where))
        rows.append(row)
    title = f"{name}: ms a decode step of one sequence [95% interval], ratios of speed, and what FP8 changes"
    header = [f"KL, same token: {one} to {other}" for one, other in pairs]
    print_table(title, ["context", *arms, *map("/".join, speedups), *header], rows)
    records += _trend(contexts, middle, at)
    print(
        f"dense: every compressed entry, sparse: the top {model.indexer.index_topk}; {model.dtype} products; "
        f"medians of {len(next(iter(ms.values())))} x {STEPS} steps, arms in turn; {os.cpu_count()} CPU threads, "
        f"load average {'unknown' if load is None else load}.\n"
        "Weights and entries are random numbers, entries of unit variance; what FP8 costs a trained model is measured "
        "by `v4jax eval --suite=kv_quant`."
    )
    records += _control(contexts, ms, at)
    if plot:
        _plot(plot, name, contexts, middle, bounds)
    return records


def _measured(middle) -> dict[str, tuple[str, str]]:
    """Return the arms that have times in `middle`, which is keyed by (context, arm)."""
    return {name: kind for name, kind in (ARMS | WEIGHTS).items() if any(arm == name for _, arm in middle)}


def _ratios(ms, context: int, fast: str, slow: str) -> list[float]:
    """Return the speed of arm `fast` relative to `slow`, one ratio per round."""
    return [b / a for a, b in zip(ms[context, fast], ms[context, slow], strict=True)]


def _trend(contexts: list[int], middle, at) -> list[dict]:
    """Report the growth of each variant's time with the context."""
    rows, records, last = [], [], contexts[-1]
    first = _GROWTH_FROM if _GROWTH_FROM in contexts else contexts[0]
    for arm, (kind, layout) in _measured(middle).items():
        where = at | {"arm": arm, "precision": layout}
        growth = middle[last, arm] / middle[first, arm]
        records.append(record("decode", "decode_growth", [growth], "ratio", context=last, base=first, **where))
        row = [arm, kind, layout, f"{growth:.2f}x"]
        if len(contexts) > 1:
            fixed, slope = fit(contexts, [middle[context, arm] for context in contexts])
            records.append(record("decode", "decode_fixed", [fixed], "ms", **where))
            records.append(record("decode", "decode_slope", [slope], "ms/token", **where))
            row.append(f"{fixed:.2f} ms + {slope * 1e6:.2f} ns * context")
        rows.append(row)
    header = ["arm", "reads", "layout", f"time at {last:,} by that at {first:,}", "time = a + b * context"]
    print_table("Growth with the context", header[: len(rows[0])], rows)
    return records


def _control(contexts: list[int], ms, at) -> list[dict]:
    """Report how far the timings of the two identical variants differ (A/A control)."""
    ratio = {context: statistics.median(_ratios(ms, context, _ARM, _CONTROL)) for context in contexts}
    worst = max(contexts, key=lambda context: abs(ratio[context] - 1))
    text = f"the A/A control differs by {abs(ratio[worst] - 1):.1%} (at {worst:,} tokens)"
    if abs(ratio[worst] - 1) > _TOLERANCE:
        text = f"WARNING: {text}: do not trust these timings"
    print(text, flush=True)
    where = at | {"arm": f"{_ARM}/{_CONTROL}"}
    return [record("decode", "control", [ratio[context]], "ratio", context=context, **where) for context in contexts]


def _plot(path: str, name: str, contexts: list[int], middle, bounds) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    colors, styles = {"dense": "tab:orange", "sparse": "tab:blue"}, {"bf16": "o--", "fp8": "s-"}
    for arm, (kind, layout) in _measured(middle).items():
        if arm == _CONTROL:
            continue
        times = np.array([middle[context, arm] for context in contexts])
        ends = np.array([bounds[context, arm] for context in contexts]).T
        bars = np.abs(ends - times)
        label = f"{arm}: {kind}, {layout}"
        color = "tab:green" if arm in WEIGHTS else colors[kind]
        label += ", weights too" * (arm in WEIGHTS)
        axes.errorbar(contexts, times, yerr=bars, fmt=styles[layout], color=color, capsize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [short(context) for context in contexts])
    axes.set(xlabel="context (tokens)", ylabel="ms a token", title=f"Decode step of one sequence, {name}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    write(figure, path)
