"""Suite `tiers`: benefit of the offload tiers.

It measures device memory of one long sequence (as suite `host_kv`), a restart with a warm disk, and many conversations
on little memory. All arms share weights and requests, and their tokens are compared. Without `serve.batch_invariant`
another batch composition changes the last bits of logits, which with random weights can change tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np
from flax import nnx

from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.config import Config, Model, load
from v4jax.core.errors import UserError
from v4jax.core.reporting import print_table
from v4jax.models.transformer import Transformer
from v4jax.serve.engine import Engine
from v4jax.serve.sampling_params import SamplingParams
from v4jax.tools.bench import host_kv
from v4jax.tools.bench.measure import interleave
from v4jax.tools.bench.report import record, write

CONTEXTS = (4096, 32_768)
CONVERSATIONS, TURNS, SYSTEMS, BURST = 200, 3, 12, 8
ANSWER, _PLENTY = 16, 1 << 40
_ANEW = "none: all read anew"
_GREEDY = SamplingParams(max_tokens=ANSWER, temperature=0.0)


def run(config: Config, rounds: int, contexts: Sequence[int] = CONTEXTS, plot: str | None = None) -> list[dict]:
    """Measure a model with random weights, print three tables and return their records.

    The tables are bytes of one sequence of the published model, time to the first token after a restart by prompt
    length, and a trace of conversations by the tiers in use.

    Args:
      config: Model, engine and cache.
      rounds: Measurements of each restart.
      contexts: Prompt lengths of the restarts, in tokens.
      plot: PNG file to draw; None draws nothing.

    Raises:
      UserError: A context cannot be measured.
    """
    contexts = sorted(set(contexts))
    model = dataclasses.replace(config.model, num_nextn_predict_layers=0)
    most = model.max_position_embeddings - ANSWER
    if not contexts or not 0 < contexts[0] <= contexts[-1] <= most:
        raise UserError(f"suite 'tiers' needs contexts from 1 to {most} tokens; give them as --contexts=4096,32768")
    transformer, cache = _random(model), dataclasses.replace(config.cache, kv_load_timeout_s=10.0)
    serve = dataclasses.replace(config.serve, num_speculative_tokens=0)
    sizes = host_kv.memory(load(host_kv.PUBLISHED).model)
    records = host_kv.show_memory(sizes) + _restarts(config, transformer, serve, cache, rounds, contexts)
    records += _trace(config, transformer, serve, cache, CONVERSATIONS)
    if plot:
        _plot(plot, sizes, records)
    return records


def _random(model: Model) -> Transformer:
    return Transformer(model, nnx.Rngs(0))


# --- a restart -----------------------------------------------------------------------------------------------------


def _restarts(config, model, serve, cache, rounds: int, contexts: Sequence[int]) -> list[dict]:
    serve = dataclasses.replace(serve, max_num_seqs=1, max_model_len=contexts[-1] + ANSWER)
    rng, answers = np.random.default_rng(0), {length: [] for length in contexts}
    prompts = {length: rng.integers(2, model.config.vocab_size, length).tolist() for length in contexts}
    with tempfile.TemporaryDirectory(prefix="v4jax-tiers-") as directory:
        on_disk = dataclasses.replace(cache, enable_prefix_caching=True, kv_disk_bytes=_PLENTY, kv_dir=directory)
        cold, salts = (
            Engine(model, serve, dataclasses.replace(cache, enable_prefix_caching=True)),
            map(str, itertools.count()),
        )

        def recompute(length: int) -> float:
            return _first(cold, prompts[length], answers, next(salts))  # a new salt excludes prefix cache hits

        def restart(length: int) -> float:
            engine = Engine(model, serve, on_disk)
            seconds = _first(engine, prompts[length], answers)
            engine.close()
            return seconds

        for length in contexts:  # the first restart fills the disk and compiles, the second compiles loads
            recompute(length), restart(length), restart(length)
        arms = {(what.__name__, length): what for length in contexts for what in (recompute, restart)}
        taken = interleave(
            {(name, length): lambda a=arm, n=length: a(n) for (name, length), arm in arms.items()}, rounds
        )
    at = {"config": config.name, "concurrency": 1, "precision": cache.kv_cache_dtype}
    rows, records = [], []
    for length in contexts:
        again, warm = taken["recompute", length], taken["restart", length]
        ratio = [a / b for a, b in zip(again, warm, strict=True)]
        same = all(answer == answers[length][0] for answer in answers[length])
        rows.append(
            [
                f"{length:,}",
                f"{statistics.median(again):.3g}",
                f"{statistics.median(warm):.3g}",
                f"{statistics.median(ratio):.1f}x",
                "yes" if same else "no",
            ]
        )
        records += [
            record("tiers", "first_token", again, "s", arm="recompute", context=length, **at),
            record("tiers", "first_token", warm, "s", arm="restart", context=length, **at),
            record("tiers", "restart_speedup", ratio, "ratio", context=length, **at),
            record("tiers", "restart_same_tokens", [float(same)], "ratio", context=length, **at),
        ]
    title = f"{config.name}: a prompt after a restart, {os.cpu_count()} CPU threads, {rounds} rounds"
    print_table(title, ["prompt", "s to first token, read anew", "from a warm disk", "faster", "same tokens"], rows)
    return records


def _first(engine: Engine, prompt: list[int], answers: dict[int, list[list[int]]], salt: str = "") -> float:
    """Return the seconds to the first token, and append the answer to those of its prompt length."""
    start, seconds, tokens = time.perf_counter(), None, []
    engine.add_request("request", prompt, _GREEDY, salt)
    while engine.busy:
        for drawn in engine.step():
            seconds = seconds or time.perf_counter() - start
            tokens += drawn.sampled.token_B[drawn.row, : drawn.count].tolist()
    answers[len(prompt)].append(tokens)
    return seconds


# --- many conversations --------------------------------------------------------------------------------------------


def _trace(config, model, serve, cache, conversations: int) -> list[dict]:
    """Replay conversations with shared prefixes that exceed device and host memory, once for each set of tiers."""
    layout = KVCacheSpec(model.config, cache.kv_cache_dtype, cache.block_size)
    blocks = 6 * conversations  # approximate number of blocks of all conversations
    page, kept = layout.block_bytes, layout.state_bytes()
    serve = dataclasses.replace(serve, max_num_seqs=BURST, max_model_len=8 * layout.block_size)
    records_kept = max(conversations // 8, 4)
    device = (1 + BURST + records_kept) * kept + max(blocks // 16, 8 * BURST + 2) * page
    host = blocks // 5 * page + 2 * conversations // 5 * kept
    tokens, rows, records = {}, [], []
    with tempfile.TemporaryDirectory(prefix="v4jax-tiers-") as directory:
        below = {
            _ANEW: {},
            "device": {},
            "device, host": {"kv_host_bytes": host},
            "device, host; lru": {"kv_host_bytes": host, "kv_eviction_policy": "lru"},
            "device, host; asked for twice": {"kv_host_bytes": host, "kv_admission_policy": "second"},
            "device, host, disk": {"kv_host_bytes": host, "kv_disk_bytes": _PLENTY, "kv_dir": directory},
        }
        for name, options in below.items():
            options = dataclasses.replace(
                cache,
                enable_prefix_caching=True,
                kv_cache_memory_bytes=device,
                num_state_snapshots=records_kept,
                **options,
            )
            engine = Engine(model, serve, options)
            anew = name == _ANEW
            _play(engine, turns(layout.block_size, 3, model.config.vocab_size, seed=1), {}, anew)  # compiles
            bursts = turns(layout.block_size, conversations, model.config.vocab_size, seed=0)
            seconds, read, same = _play(engine, bursts, tokens, anew)
            stats = engine.stats()
            engine.close()
            hits = {tier: stats.get(f"{tier}_block_hits", 0) for tier in ("host", "disk")}
            rows.append(
                [
                    name,
                    f"{read / seconds:,.0f}",
                    f"{seconds:.1f}",
                    f"{stats['prefix_cache_hit_rate']:.0%}",
                    f"{stats['prefix_cache_hit_ceiling']:.0%}",
                    f"{hits['host']:,.0f}",
                    f"{hits['disk']:,.0f}",
                    f"{_resumable(stats):,.0f}",
                    f"{_resumable(stats) / stats['kv_device_used_bytes'] * 1e9:,.0f}",
                    f"{same:.1%}",
                ]
            )
            at = {"config": config.name, "arm": name, "concurrency": BURST, "precision": cache.kv_cache_dtype}
            for metric, value, unit in [
                ("tokens_per_second", read / seconds, "1/s"),
                ("hit_rate", stats["prefix_cache_hit_rate"], "ratio"),
                ("hit_ceiling", stats["prefix_cache_hit_ceiling"], "ratio"),
                ("same_tokens", same, "ratio"),
                ("resumable", _resumable(stats), "1"),
                ("device_bytes", stats["kv_device_used_bytes"], "B"),
                ("resumable_per_device_gb", _resumable(stats) / stats["kv_device_used_bytes"] * 1e9, "1"),
                ("host_block_hits", hits["host"], "1"),
                ("disk_block_hits", hits["disk"], "1"),
            ]:
                records.append(record("tiers", f"trace_{metric}", [value], unit, **at))
    what = f"{conversations} conversations of {TURNS} turns, {SYSTEMS} shared beginnings, bursts of {BURST}"
    header = [
        "tiers",
        "tokens/s",
        "s",
        "hits",
        "ceiling",
        "of host",
        "of disk",
        "can go on",
        "a device GB",
        "same tokens",
    ]
    print_table(f"{config.name}: {what}", header, rows)
    return records


def _resumable(stats: dict[str, float]) -> float:
    """Return the number of places where a conversation can resume: state snapshots of the tier that has most."""
    return max(stats["num_snapshots_cached"], stats.get("host_snapshots", 0), stats.get("disk_snapshots", 0))


def turns(block: int, conversations: int, vocab: int, seed: int) -> Iterator[list[tuple[int, list[int]]]]:
    """Yield bursts of (conversation, new user tokens); the first turn of a conversation begins with a shared prefix."""
    rng = np.random.default_rng(seed)
    systems = [rng.integers(2, vocab, block * int(rng.integers(1, 4))).tolist() for _ in range(SYSTEMS)]
    weight = 1 / np.arange(1, SYSTEMS + 1)
    order = [*range(conversations)] * TURNS
    rng.shuffle(order)
    begun = set()
    for start in range(0, len(order), BURST):
        burst = []
        for conversation in dict.fromkeys(order[start : start + BURST]):
            system = systems[rng.choice(SYSTEMS, p=weight / weight.sum())] if conversation not in begun else []
            begun.add(conversation)
            new = rng.integers(2, vocab, int(rng.integers(block // 2, block))).tolist()
            burst.append((conversation, [*system, *new]))
        yield burst


def _play(
    engine: Engine, bursts: Iterator[list[tuple[int, list[int]]]], expected: dict[int, dict], salted: bool = False
) -> tuple[float, int, float]:
    """Serve bursts of turns. The prompt of a turn contains all earlier turns of its conversation.

    Args:
      engine: The engine.
      bursts: Bursts as of `turns`.
      expected: Answers by burst and conversation. Missing ones are added, so that all arms continue with equal answers.
      salted: Whether salts exclude prefix cache hits between turns.

    Returns:
      Seconds, number of prompt and answer tokens, and the share of answers equal to `expected`.
    """
    history, count, seconds, same = {}, 0, 0.0, []
    for number, burst in enumerate(bursts):
        start = time.perf_counter()
        for conversation, new in burst:
            history[conversation] = [*history.get(conversation, ()), *new]
            engine.add_request(
                conversation, history[conversation], _GREEDY, str((number, conversation)) if salted else ""
            )
            count += len(history[conversation]) + ANSWER
        answers = {conversation: [] for conversation, _ in burst}
        while engine.busy:
            for drawn in engine.step():
                answers[drawn.id] += drawn.sampled.token_B[drawn.row, : drawn.count].tolist()
        seconds += time.perf_counter() - start
        known = expected.setdefault(number, answers)
        for conversation, answer in answers.items():
            same.append(answer == known[conversation])
            history[conversation] += known[conversation]
    return seconds, count, statistics.mean(same)


# --- plot ----------------------------------------------------------------------------------------------------------


def _plot(path: str, sizes: dict[tuple[int, str], host_kv.Bytes], records: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    memory, restart, trace = figure.subplots(1, 3)
    host_kv.draw_memory(memory, sizes)
    found = lambda metric, arm: [r for r in records if r["metric"] == metric and r.get("arm") == arm]
    for i, (arm, name) in enumerate({"recompute": "read anew", "restart": "from a warm disk"}.items()):
        taken = found("first_token", arm)
        bars = restart.bar(np.arange(len(taken)) + 0.4 * (i - 0.5), [r["value"] for r in taken], 0.38, label=name)
        restart.bar_label(bars, fmt="%.2g")
    restart.set_xticks(range(len(taken)), [f"{r['context']:,}" for r in taken])
    restart.set_yscale("log")
    restart.margins(y=0.15)
    restart.set(xlabel="prompt (tokens)", ylabel="s to the first token", title="A prompt after a restart")
    restart.legend()
    speeds = [r for r in records if r["metric"] == "trace_tokens_per_second"]
    bars = trace.barh([r["arm"] for r in speeds], [r["value"] for r in speeds])
    rates = [found("trace_hit_rate", r["arm"])[0]["value"] for r in speeds]
    trace.bar_label(bars, [f"{rate:.0%} found" for rate in rates], padding=3)
    trace.invert_yaxis()
    trace.set_xlim(0, 1.3 * max(r["value"] for r in speeds))  # room for the labels
    ceiling = found("trace_hit_ceiling", speeds[-1]["arm"])[0]["value"]
    trace.set(xlabel=f"tokens a second (at most {ceiling:.0%} can be found)", title="Many conversations")
    for each in (memory, restart):
        each.grid(alpha=0.3, which="both", axis="y")
    write(figure, path)
