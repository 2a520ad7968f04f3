"""Suite `serve`: throughput and latency of concurrent requests against one, and a burst that exceeds the KV cache."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from dataclasses import dataclass, field

import numpy as np
from flax import nnx

from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.config import Config, Model
from v4jax.core.errors import UserError
from v4jax.core.reporting import print_table
from v4jax.models.transformer import Transformer
from v4jax.serve.engine import Engine
from v4jax.serve.sampling_params import SamplingParams
from v4jax.tools.bench.measure import interleave
from v4jax.tools.bench.report import record

MANY = 16  # concurrent requests, compared with one
PROMPT, NEW = 64, 128  # prompt tokens and new tokens of each
BURST, BURST_NEW, SHARED = 200, 32, 4  # requests, new tokens of each, and prefixes that half of them share
_BLOCKS = 2  # maximum blocks of a request of the burst
POOL = 8  # requests of the burst for which the cache has room
_FORMATS = ("{:,.0f}", "{:.1f}x", "{:.3g}", "{:.3g}", "{:.2f}")  # of the columns of the first table


@dataclass(frozen=True)
class _Request:
    prompt: list[int]
    sampling: SamplingParams
    salt: str = ""


@dataclass
class _Answer:
    """Tokens of an answer, and the seconds from the start to each."""

    tokens: list[int] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)


def run(config: Config, rounds: int) -> list[dict]:
    """Serve `MANY` concurrent requests and one alone in turn, then one burst; print two tables, return their records.

    One engine with random weights serves all requests. Its cache has room for `POOL` requests of the burst. Every
    answer of the burst is compared with that of the same request alone, for which a salt excludes prefix cache hits.

    Args:
      config: Model, engine and cache.
      rounds: Measurements of each concurrency.

    Raises:
      UserError: The config's max_model_len is too small.
    """
    model = dataclasses.replace(config.model, num_nextn_predict_layers=0)
    block = KVCacheSpec(model, config.cache.kv_cache_dtype, config.cache.block_size).block_size
    need = max(_BLOCKS * block, PROMPT + NEW)
    if config.serve.max_model_len < need:
        raise UserError(
            f"suite 'serve' needs --config.serve.max_model_len={need}, and it is {config.serve.max_model_len}"
        )
    serve = dataclasses.replace(config.serve, max_num_seqs=MANY, num_speculative_tokens=0)
    tokens = max(POOL * _BLOCKS * block, MANY * -(-(PROMPT + NEW) // block) * block)
    engine = Engine(
        _random(model), serve, dataclasses.replace(config.cache, kv_cache_tokens=tokens, enable_prefix_caching=True)
    )
    rng = np.random.default_rng(0)
    prompts = lambda count: rng.integers(2, model.vocab_size, (count, PROMPT)).tolist()
    arms = {count: lambda count=count: _serve(engine, [_asked(p, NEW) for p in prompts(count)]) for count in (1, MANY)}
    for arm in arms.values():
        arm()
    taken = interleave(arms, rounds)
    at = {"config": config.name, "precision": config.cache.kv_cache_dtype}
    what = f"{config.name}, {model.dtype}, kv_cache_dtype {config.cache.kv_cache_dtype}, {os.cpu_count()} CPU threads"
    return [*_throughput(taken, at, what), *_burst(engine, _requests(model, block, rng), at)]


def _random(model: Model) -> Transformer:
    return Transformer(model, nnx.Rngs(0))


def _asked(prompt: list[int], new: int, seed: int = 0) -> _Request:
    return _Request(prompt, SamplingParams(max_tokens=new, temperature=0.8, seed=seed))


def _serve(engine: Engine, requests: list[_Request]) -> list[_Answer]:
    """Add all requests at once, and step the engine until all are finished."""
    start, answers = time.perf_counter(), [_Answer() for _ in requests]
    for id, request in enumerate(requests):
        engine.check(request.prompt, request.sampling, f"request {id}")
        engine.add_request(id, request.prompt, request.sampling, request.salt)
    while engine.busy:
        for drawn in engine.step():
            answers[drawn.id].tokens += drawn.sampled.token_B[drawn.row, : drawn.count].tolist()
            answers[drawn.id].stamps += [time.perf_counter() - start] * drawn.count
    return answers


def _first(answers: list[_Answer]) -> list[float]:
    return [answer.stamps[0] for answer in answers]


def _speed(answers: list[_Answer]) -> float:
    """Return new tokens per second over all requests, including prefill time."""
    return sum(len(answer.tokens) for answer in answers) / max(answer.stamps[-1] for answer in answers)


def _interval(answers: list[_Answer]) -> float:
    """Return the median over requests of the mean milliseconds between tokens."""
    each = [(answer.stamps[-1] - answer.stamps[0]) / (len(answer.stamps) - 1) for answer in answers]
    return 1e3 * statistics.median(each)


def _throughput(taken: dict[int, list[list[_Answer]]], at: dict, what: str) -> list[dict]:
    rows, records = [], []
    speeds = {count: [_speed(answers) for answers in rounds] for count, rounds in taken.items()}
    for count, rounds in taken.items():
        first = [statistics.median(_first(answers)) for answers in rounds]
        last = [max(_first(answers)) for answers in rounds]
        later = [_interval(answers) for answers in rounds]
        ratios = [many / one for many, one in zip(speeds[count], speeds[1], strict=True)]
        middle = [statistics.median(values) for values in (speeds[count], ratios, first, last, later)]
        rows.append([count, *(text.format(value) for text, value in zip(_FORMATS, middle, strict=True))])
        where = at | {"concurrency": count, "context": PROMPT + NEW}
        records += [
            record("serve", "tokens_per_second", speeds[count], "1/s", **where),
            record("serve", "throughput_ratio", ratios, "ratio", base=1, **where),
            record("serve", "time_to_first_token", first, "s", **where),
            record("serve", "time_to_last_first_token", last, "s", **where),
            record("serve", "token_time", later, "ms", **where),
        ]
    header = ["at once", "tokens/s", "of one", "s to the first token", "the last one's", "ms a token of a request"]
    print_table(f"{what}: prompts of {PROMPT} tokens, {NEW} new ones", header, rows)
    return records


def _requests(model: Model, block: int, rng: np.random.Generator) -> list[_Request]:
    """Make the burst: half of the requests share a prefix of one block, the others enter a second block in decoding."""
    tokens = lambda count: rng.integers(2, model.vocab_size, count).tolist()
    shared, requests = [tokens(block) for _ in range(SHARED)], []
    most = min(BURST_NEW, block - BURST_NEW)
    for i in range(BURST):
        beyond = int(rng.integers(1, most + 1))
        prompt = [*shared[i // 2 % SHARED], *tokens(beyond)] if i % 2 else tokens(block - beyond)
        requests.append(_asked(prompt, BURST_NEW, seed=i))
    return requests


def _burst(engine: Engine, requests: list[_Request], at: dict) -> list[dict]:
    """Serve each request alone, then all of them at once."""
    alone = [_serve(engine, [dataclasses.replace(each, salt=f"alone {i}")])[0] for i, each in enumerate(requests)]
    before = engine.stats()
    answers = _serve(engine, requests)
    engine.schedulers[0].check_invariants()  # raises if the bookkeeping is inconsistent
    stats = engine.stats()
    names = ("num_preemptions", "prefix_cache_hits", "num_block_evictions")
    count = {name: int(stats[name] - before[name]) for name in names}
    equal = sum(one.tokens == other.tokens for one, other in zip(answers, alone, strict=True))
    leaked = engine.schedulers[0].block_pool.capacity - int(stats["num_blocks_free"] + stats["num_blocks_cached"])
    values = {
        "burst_equal_answers": (equal, "requests"),
        "burst_leaked_pages": (leaked, "pages"),
        "burst_preemptions": (count["num_preemptions"], "preemptions"),
        "burst_prefix_hits": (count["prefix_cache_hits"] // engine.kv_cache_spec.block_size, "blocks"),
        "burst_evictions": (count["num_block_evictions"], "pages"),
        "burst_tokens_per_second": (_speed(answers), "1/s"),
        "burst_time_to_first_token": (statistics.median(_first(answers)), "s"),
        "burst_time": (max(answer.stamps[-1] for answer in answers), "s"),
    }
    label = lambda name: name.removeprefix("burst_").replace("_", " ")
    rows = [[label(name), f"{value:,.4g} {unit}"] for name, (value, unit) in values.items()]
    print_table(f"{len(requests)} requests at once into a cache that holds {POOL}", ["what", "value"], rows)
    if equal < len(requests):
        print("Where answers differ, rounding has decided between two tokens; see --config.serve.batch_invariant=true.")
    where = at | {"concurrency": len(requests), "context": _BLOCKS * engine.kv_cache_spec.block_size}
    return [record("serve", name, [value], unit, **where) for name, (value, unit) in values.items()]
