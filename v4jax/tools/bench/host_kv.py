"""Suite `host_kv`: savings and cost of CSA entries in host memory with a device cache of recent top-k entries.

It prints three tables: the bytes of a published model's cache, whose arrays are allocated layer by layer without
weights; the speed of a decode step against that with all entries on the device; and, with a checkpoint, the share of a
trained model's top-k entries that are cached on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from v4jax import checkpoint as store
from v4jax.cache.allocate import allocate_layer
from v4jax.cache.entry_cache import read_counters
from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.config import Config, Model, Serve, load
from v4jax.core.errors import UserError
from v4jax.core.reporting import print_table
from v4jax.kernels.attention import use_gather
from v4jax.models.transformer import Transformer
from v4jax.parallel.host_memory import is_host
from v4jax.serve import LLM, SamplingParams, model_steps
from v4jax.serve.model_steps import DecodeState, KVCaches
from v4jax.tools.bench.decode import filled
from v4jax.tools.bench.measure import interleave, timed
from v4jax.tools.bench.report import record, short, write

PUBLISHED, LENGTHS, SLOTS = "v4_flash", (16_384, 131_072, 1_048_576), 1024
TARGETS = {16_384: 0.55, 131_072: 0.75, 1_048_576: 0.78}  # aimed-at share of device bytes saved
CONTEXTS, ROWS, STEPS = (16_384, 65_536), 4, 16
TEXT, ASKED = 2048, 256  # tokens that a trained model generates, and how many of the last are counted
_FORMAT = "fp8"


def run(
    config: Config,
    rounds: int,
    contexts: Sequence[int] = CONTEXTS,
    checkpoint: str | None = None,
    plot: str | None = None,
) -> list[dict]:
    """Print the three tables and return their records.

    Args:
      config: Model that decodes in the second table.
      rounds: Measurements of each variant in the second table.
      contexts: Contexts of the second table, in tokens.
      checkpoint: Directory of a trained model for the third table; None omits it.
      plot: PNG file to draw; None draws nothing.

    Raises:
      UserError: A context cannot be measured, or the model or the checkpoint has no CSA layers.
    """
    trained = store.load_config(checkpoint).model if checkpoint else None
    for model in filter(None, (config.model, trained)):
        if "csa" not in model.layer_types:
            raise UserError("suite 'host_kv' is about csa layers, and this model has none; choose another")
    contexts = _checked(config.model, contexts)
    sizes = memory(load(PUBLISHED).model)
    records = show_memory(sizes) + _speed(config, rounds, contexts)
    hits = hit_rates(checkpoint) if checkpoint else {}
    records += _show_hits(store.load_config(checkpoint).name, trained, hits) if hits else []
    if plot:
        _plot(plot, sizes, hits)
    return records


def _checked(model: Model, contexts: Sequence[int]) -> list[int]:
    layout = KVCacheSpec(model, _FORMAT)
    for context in contexts:
        entries = -(-context // layout.block_size) * layout.entries("csa")
        if not (STEPS < context <= model.max_position_embeddings and use_gather(entries, model.indexer.index_topk, 1)):
            raise UserError(
                f"context {context} cannot be measured; take more than topk {model.indexer.index_topk} entries hold, "
                f"and at most model.max_position_embeddings {model.max_position_embeddings}"
            )
    if not contexts:
        raise UserError("no contexts to measure; give at least one")
    return sorted(set(contexts))


# --- memory --------------------------------------------------------------------------------------------------------


class Bytes(NamedTuple):
    """Bytes of a cache.

    Attributes:
      device: All arrays on the device.
      entries: Those of them that hold entries, index keys or cached copies of entries.
      host: All arrays in host memory.
    """

    device: int
    entries: int
    host: int


def memory(model: Model) -> dict[tuple[int, str], Bytes]:
    """Return bytes of one sequence's cache by context and arm: bf16, fp8, and live (fp8, `SLOTS` copies per layer)."""
    arms = {"bf16": ("bf16", 0), _FORMAT: (_FORMAT, 0), "live": (_FORMAT, SLOTS)}
    return {
        (context, arm): _bytes(KVCacheSpec(model, name, 0, hot), context)
        for context in LENGTHS
        for arm, (name, hot) in arms.items()
    }


def _bytes(layout: KVCacheSpec, context: int) -> Bytes:
    """Allocate, count and free one layer at a time, because all layers together may exceed memory."""
    blocks = -(-context // layout.block_size)
    device = np.zeros((2, blocks), np.int32).nbytes + 2 * 2 * 4  # block table and decode state
    entries = host = 0
    for kind in layout.model.layer_types:
        kept = allocate_layer(layout, kind, blocks + 1, 2)  # block 0 and state slot 0 are reserved
        here = lambda part: sum(leaf.nbytes for leaf in jax.tree.leaves(part) if not is_host(leaf))
        host += sum(leaf.nbytes for leaf in jax.tree.leaves(kept) if is_host(leaf))
        entries += here((kept.entries, kept.index_keys, kept.device_cache))
        device += here((kept.window_ring_ZSH, kept.compressor_state))
    return Bytes(device + entries, entries, host)


def show_memory(sizes: dict[tuple[int, str], Bytes]) -> list[dict]:
    """Print the result of `memory` and return its records."""
    rows, records = [], []
    mib = lambda size: f"{size / 2**20:,.1f}"
    for context in dict.fromkeys(context for context, _ in sizes):
        wide, plain, live = (sizes[context, arm] for arm in ("bf16", _FORMAT, "live"))
        less, pages = 1 - live.device / plain.device, 1 - live.entries / plain.entries
        target = TARGETS.get(context, 0.0)
        rows.append(
            [
                f"{context:,}",
                mib(wide.device),
                mib(plain.device),
                mib(live.device),
                mib(live.host),
                mib(live.device + live.host),
                f"{less:.1%}",
                f"{pages:.1%}",
                f"{target:.0%}",
                f"{1 - plain.device / wide.device:.1%}",
            ]
        )
        at = {"config": PUBLISHED, "context": context, "concurrency": 1, "precision": _FORMAT, "slots": SLOTS}
        for metric, value, unit in [
            ("device_bytes_plain", plain.device, "B"),
            ("device_bytes_live", live.device, "B"),
            ("host_bytes_live", live.host, "B"),
            ("device_bytes_bf16", wide.device, "B"),
            ("device_less", less, "share"),
            ("device_less_without_records", pages, "share"),
            ("device_less_target", target, "share"),
            ("fp8_less", 1 - plain.device / wide.device, "share"),
        ]:
            records.append(record("host_kv", metric, [value], unit, **at))
    header = [
        "context",
        "bf16 MiB",
        "fp8 MiB",
        "live: device",
        "host",
        "both",
        "device less",
        "without records",
        "target",
        "fp8 by bf16, apart",
    ]
    print_table(f"{PUBLISHED}: the cache of one sequence, {SLOTS:,} copies a CSA layer, from live arrays", header, rows)
    print(
        "device less: live by fp8, of all arrays, copies, their maps, window rows and compressor tails included; "
        "without records: the last two left out, which do not grow."
    )
    return records


# --- speed ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Arm:
    """The engine's decode program and a cache that it runs on. Rows have equal lengths and their own blocks."""

    structure: object
    weights: list[jax.Array]
    live: KVCaches
    rows: tuple[jax.Array, jax.Array]

    def step(self, heads: DecodeState) -> jax.Array:
        self.live, _, logits_BTV = model_steps.decode(self.structure, self.weights, self.live, heads, self.rows, False)
        return logits_BTV

    def seconds(self, heads: list[DecodeState]) -> float:
        """Return the mean seconds per step of all steps but the first."""
        jax.block_until_ready(self.step(heads[0]))
        return timed(lambda: [self.step(each) for each in heads[1:]][-1]) / (len(heads) - 1)


def _arm(model: Model, graph: tuple, context: int, hot: int) -> _Arm:
    layout = KVCacheSpec(model, _FORMAT, 0, hot)
    blocks = -(-context // layout.block_size)
    layers = [allocate_layer(layout, kind, ROWS * blocks + 1, ROWS + 1) for kind in model.layer_types]
    layers = [[filled(kept, np.random.default_rng(i))] for i, kept in enumerate(layers)]
    block_table_ZA = np.full((ROWS + 1, blocks), -1, np.int32)
    block_table_ZA[1:] = 1 + np.arange(ROWS * blocks).reshape(ROWS, blocks)
    return _Arm(
        *graph, KVCaches(layers, None), jax.device_put((np.arange(1, ROWS + 1, dtype=np.int32), block_table_ZA))
    )


def _random(model: Model) -> Transformer:
    return Transformer(model, nnx.Rngs(0))


def _speed(config: Config, rounds: int, contexts: Sequence[int]) -> list[dict]:
    """Time decode steps of both arms on the same forced tokens, after comparing their logits bit by bit."""
    model = dataclasses.replace(config.model, num_nextn_predict_layers=0, kv_qdq=False)
    graphdef, variables = nnx.split(_random(model))
    weights, tree = jax.tree.flatten(variables)
    graph, slots = (model_steps.model_def(graphdef, tree), weights), max(SLOTS, ROWS * model.indexer.index_topk)
    tokens = np.random.default_rng(0).integers(2, model.vocab_size, (STEPS + 1, ROWS + 1), np.int32)
    rows, records = [], []
    for context in contexts:
        arms = {name: _arm(model, graph, context, hot) for name, hot in (("device", 0), ("live", slots))}
        place = lambda i, context=context: np.full(ROWS + 1, context - STEPS - 1 + i, np.int32)
        empty = np.zeros((ROWS + 1, 0), np.int32)
        heads = [jax.device_put(DecodeState(token, place(i), empty)) for i, token in enumerate(tokens)]
        same = all(np.array_equal(*(np.asarray(arm.step(each)) for arm in arms.values())) for each in heads)
        before = _counts(arms["live"].live)
        taken = interleave({name: functools.partial(arm.seconds, heads) for name, arm in arms.items()}, rounds)
        found, fetched = _counts(arms["live"].live) - before
        rate = found / (found + fetched)
        ratio = [here / live for here, live in zip(taken["device"], taken["live"], strict=True)]
        speed = {name: [ROWS / seconds for seconds in times] for name, times in taken.items()}
        rows.append(
            [
                f"{context:,}",
                *(f"{statistics.median(each):,.1f}" for each in speed.values()),
                f"{statistics.median(ratio):.2f}x",
                "yes" if same else "no",
                f"{rate:.0%}",
            ]
        )
        at = {"config": config.name, "context": context, "concurrency": ROWS, "precision": _FORMAT, "slots": slots}
        records += [record("host_kv", "decode_speed", each, "1/s", arm=name, **at) for name, each in speed.items()]
        records += [
            record("host_kv", "decode_speed_kept", ratio, "ratio", **at),
            record("host_kv", "same_bits", [float(same)], "share", **at),
            record("host_kv", "hit_rate", [rate], "share", source="random", **at),
        ]
    title = f"{config.name}: decoding {ROWS} sequences, {slots:,} copies a CSA layer, {_FORMAT}, {rounds} rounds"
    header = ["context", "tokens/s, all on the device", "live", "speed kept", "same bits", "found on the device"]
    print_table(title, header, rows)
    print(
        "Weights, entries and tokens are random numbers: top-k entries change more by step than a trained model's.\n"
        f"{os.cpu_count()} CPU threads; on a CPU host and device memory are one, and a fetch is a copy."
    )
    return records


def _counts(live: KVCaches) -> np.ndarray:
    """Return the numbers of top-k entries found on the device and fetched from the host, over all layers."""
    kept = [kept for run in live.layers for kept in run if kept.device_cache is not None]
    return sum(read_counters(np.asarray(each.device_cache.counters_5)) for each in kept)


# --- hit rates -----------------------------------------------------------------------------------------------------


def hit_rates(checkpoint: str) -> dict[int, tuple[float, bool]]:
    """Measure hit rates of a trained model on text that it generates.

    The model first generates `TEXT` tokens at temperature 1. An engine of each size then gets all but the last `ASKED`
    of them as a prompt, and generates `ASKED` tokens.

    Args:
      checkpoint: Directory of the checkpoint.

    Returns:
      By device entries per layer: the share of top-k entries found on the device, and whether the tokens equal those of
      the first size.
    """
    model = store.load(checkpoint)
    k, limits = (
        model.config.indexer.index_topk,
        dataclasses.asdict(Serve(max_num_seqs=1, max_model_len=TEXT, max_num_batched_tokens=256)),
    )
    sampling = SamplingParams(max_tokens=TEXT - 1, temperature=1.0, seed=0, ignore_eos=True)
    first = [model.config.bos_id or 0]
    [text] = LLM(model, **limits).generate([first], sampling)
    prompt = [*first, *text.token_ids][: TEXT - ASKED]
    out, answers = {}, []
    for slots in (k * 2**power for power in range(6)):
        if slots < TEXT // model.config.compress_rate_csa:
            llm = LLM(model, kv_device_entries=slots, **limits)
            [answer] = llm.generate([prompt], dataclasses.replace(sampling, max_tokens=ASKED))
            answers.append(answer.token_ids)
            out[slots] = llm.stats()["device_entry_cache_hit_rate"], answers[0] == answer.token_ids
    return out


def _show_hits(name: str, model: Model, hits: dict[int, tuple[float, bool]]) -> list[dict]:
    entries = TEXT // model.compress_rate_csa
    rows, records = [], []
    for slots, (rate, same) in hits.items():
        rows.append([f"{slots:,}", f"{slots / entries:.0%}", f"{rate:.1%}", "yes" if same else "no"])
        at = {"config": name, "context": TEXT, "concurrency": 1, "slots": slots}
        records.append(record("host_kv", "hit_rate", [rate], "share", source="trained", same_tokens=same, **at))
    title = f"{name}, trained: {ASKED} tokens of its own text after {TEXT - ASKED:,}, topk {model.indexer.index_topk}"
    print_table(title, ["copies a layer", "of all entries", "top-k entries found on the device", "same tokens"], rows)
    return records


def _plot(path: str, sizes: dict[tuple[int, str], Bytes], hits: dict[int, tuple[float, bool]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10 if hits else 6, 4.5), layout="constrained")
    axes = figure.subplots(1, 2 if hits else 1, squeeze=False)[0]
    draw_memory(axes[0], sizes)
    if hits:
        axes[1].plot(list(hits), [rate for rate, _ in hits.values()], "o-")
        axes[1].set_xscale("log", base=2)
        axes[1].set(
            xlabel="copies a layer", ylabel="top-k entries found on the device", ylim=(0, 1), title="Trained model"
        )
    for each in axes:
        each.grid(alpha=0.3, which="both")
    write(figure, path)


def draw_memory(axes, sizes: dict[tuple[int, str], Bytes]) -> None:
    """Draw the result of `memory` as bars on a matplotlib Axes."""
    contexts = list(dict.fromkeys(context for context, _ in sizes))
    for i, (arm, color) in enumerate({"bf16": "tab:gray", _FORMAT: "tab:orange", "live": "tab:blue"}.items()):
        bars = [sizes[context, arm].device / 2**20 for context in contexts]
        axes.bar(np.arange(len(contexts)) + 0.27 * (i - 1), bars, 0.25, color=color, label=arm)
    axes.set_yscale("log")
    axes.set_xticks(range(len(contexts)), [short(context) for context in contexts])
    axes.set(xlabel="context (tokens)", ylabel="MiB on the device", title=f"Cache of one sequence, {PUBLISHED}")
    axes.legend()
