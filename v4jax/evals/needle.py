"""Suite `needle`: retrieval from haystacks through the engine, with a bf16 and with a quantized KV cache.

A model trained on `data.source=needle` reads a haystack (see `data/needle.py`) and is asked for the value of one key.
Both arms are sparse and have the same weights and questions. The reference stores entries in bfloat16 and rounds
nothing in the forward pass, even if the model was trained with `kv_qdq`. The other arm computes as the model was
trained and stores entries in `kv_cache_dtype`.

Each needle of a haystack is one request. The first request prefills the haystack, the others find its blocks in the
prefix cache. A bin is a (context, depth) pair with `trials` needles in one of `depths` equal parts of the haystack,
from as many haystacks as needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from flax import nnx

from v4jax import checkpoint as store
from v4jax import config as configs
from v4jax.cache.kv_cache_spec import KV_CACHE_DTYPES, KVCacheSpec
from v4jax.core.errors import UserError
from v4jax.core.reporting import print_table
from v4jax.data.needle import QUESTION, SOURCE, VALUE, Haystack, TokenRanges, haystack
from v4jax.evals.thresholds import read as read_bounds
from v4jax.models.transformer import Transformer
from v4jax.serve import LLM, SamplingParams

REFERENCE = "bf16"
# name -> (bound, whether it is an upper one): the share of needles found, and the reference's share minus it
BOUNDS = {"accuracy": (0.95, False), "lost": (0.01, True)}
_SPACING = 32  # minimum tokens of haystack per needle
_REQUESTS = 8  # concurrent requests
_CHUNK = 1024  # tokens of a prefill chunk
_SEED = 2026


def run(
    checkpoint: str,
    kv_cache_dtype: str = "fp8_fp4",
    contexts: Sequence[int | str] = (1024, 4096, 16_384),
    depths: int = 5,
    trials: int = 100,
    bounds: str = "",
) -> list[dict]:
    """Measure retrieval with both caches, print a table for each context and return the records.

    Args:
      checkpoint: Directory of the checkpoint.
      kv_cache_dtype: Format of the quantized cache.
      contexts: Lengths of haystacks in tokens.
      depths: Number of depths.
      trials: Questions in each bin.
      bounds: Bounds of every bin that override the defaults, such as "accuracy=0.9,lost=0.02".

    Returns:
      Records by bin and metric; `holds` is whether the bound holds.

    Raises:
      UserError: The checkpoint was trained on other data, a context is impossible, or a bound is unknown.
    """
    limits = read_bounds(bounds, {name: bound for name, (bound, _) in BOUNDS.items()})
    contexts = _contexts(contexts)
    config = store.load_config(checkpoint)
    _check(config, kv_cache_dtype, max(contexts))
    alphabet, places = TokenRanges.of(config.model), {"suite": "needle", "config": config.name, "trials": trials}
    stacks = {context: draw(alphabet, context, depths, trials) for context in contexts}
    model = store.load(checkpoint)
    records = []
    for context, hay in stacks.items():
        arms = {REFERENCE: unrounded(model), kv_cache_dtype: model}
        right = {name: found(arm, name, hay, depths)[:, :trials] for name, arm in arms.items()}
        judged = judge(right, limits, places | {"context": context})
        _print(f"{config.name}: needles found in {context:,} tokens, {trials} trials a depth", judged, kv_cache_dtype)
        records += judged
    return records


def unrounded(model: Transformer) -> Transformer:
    """Return the model with a forward pass that rounds no entries and keys."""
    plain = dataclasses.replace(model.config, kv_qdq=False)
    graph, _ = nnx.split(nnx.eval_shape(lambda: Transformer(plain, nnx.Rngs(0))))
    return nnx.merge(graph, nnx.state(model))


def draw(alphabet: TokenRanges, context: int, depths: int, trials: int) -> list[Haystack]:
    """Draw haystacks of `context` tokens, with equally many needles in every depth and at least `trials` in total."""
    each = min(trials, context // _SPACING // depths, len(alphabet.keys) ** 2 // depths)
    if not each:
        raise UserError(f"--contexts={context} is too short for {depths} depths; give at least {_SPACING * depths}")
    rng = np.random.default_rng((_SEED, context))
    return [haystack(rng, alphabet, context, each * depths) for _ in range(-(-trials // each))]


def found(model: Transformer, kv_cache_dtype: str, stacks: list[Haystack], depths: int) -> np.ndarray:
    """Return whether each needle was found, bool [depths, needles of a depth], the earliest depth first."""
    context, room = len(stacks[0].tokens_T), KVCacheSpec(model.config, kv_cache_dtype).block_size
    llm = LLM(
        model,
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_tokens=context + 2 * _REQUESTS * room,
        max_num_seqs=_REQUESTS,
        max_model_len=context + QUESTION + VALUE,
        max_num_batched_tokens=_CHUNK,
    )
    right = [_ask(llm, stack, TokenRanges.of(model.config).ask) for stack in stacks]
    return np.concatenate([part.reshape(depths, -1) for part in right], axis=1)


def _ask(llm: LLM, stack: Haystack, ask: int) -> np.ndarray:
    """Return whether each needle of a haystack was found, bool [needles]."""
    hay, right = stack.tokens_T.tolist(), []
    greedy = SamplingParams(max_tokens=VALUE, temperature=0.0, ignore_eos=True)
    questions = stack.questions(ask).tolist()
    for first in range(0, len(questions), _REQUESTS):  # limits memory: each prompt is a copy of the haystack
        prompts = [hay + question for question in questions[first : first + _REQUESTS]]
        right += [output.token_ids for output in llm.generate(prompts, greedy)]
    return (np.array(right) == stack.answers()).all(axis=1)


def judge(right: dict[str, np.ndarray], limits: dict[str, float], place: dict) -> list[dict]:
    """Make the records of one context: the share that each arm found at each depth, and the loss of the second arm."""
    records = []
    shares = {name: rows.mean(axis=1) for name, rows in right.items()}
    (_, reference), (kv_cache_dtype, other) = shares.items()
    for depth in range(len(reference)):
        values = [
            ("accuracy", REFERENCE, reference[depth]),
            ("accuracy", kv_cache_dtype, other[depth]),
            ("lost", kv_cache_dtype, reference[depth] - other[depth]),
        ]
        for metric, precision, value in values:
            value, bound = round(float(value), 9), limits[metric]  # in floating point 1 - 0.99 exceeds 0.01
            holds = value <= bound if BOUNDS[metric][1] else value >= bound
            records.append(
                place
                | {
                    "metric": metric,
                    "value": value,
                    "unit": "share",
                    "precision": precision,
                    "depth": (depth + 0.5) / len(reference),
                    "bound": bound,
                    "holds": holds,
                }
            )
    return records


def _print(title: str, records: list[dict], kv_cache_dtype: str) -> None:
    """Print one row per depth, given as the share of the haystack before the middle of the bin."""
    rows = []
    for depth in sorted({record["depth"] for record in records}):
        parts = [record for record in records if record["depth"] == depth]
        shares = [f"{100 * part['value']:.1f} %" for part in parts]
        rows.append([f"{depth:.2f}", *shares, "yes" if all(part["holds"] for part in parts) else "NO"])
    print_table(title, ["depth", REFERENCE, kv_cache_dtype, "lost", "holds"], rows)


def _contexts(given: Sequence[int | str]) -> list[int]:
    """Parse and sort contexts. Raises UserError for anything but positive integers."""
    try:
        contexts = sorted({int(context) for context in given})
    except ValueError:
        contexts = []
    if not contexts or contexts[0] < 1:
        raise UserError(f"--contexts={','.join(map(str, given))} is not a list of numbers of tokens, such as 1024,4096")
    return contexts


def _check(config: configs.Config, kv_cache_dtype: str, context: int) -> None:
    """Raise UserError if this model or these options cannot be measured."""
    if config.data.source != SOURCE:
        raise UserError(
            f"{config.name} learnt from {config.data.source!r}, not to find needles; train --config=bench/needle"
        )
    if kv_cache_dtype not in KV_CACHE_DTYPES or kv_cache_dtype == REFERENCE:
        others = ", ".join(name for name in KV_CACHE_DTYPES if name != REFERENCE)
        raise UserError(f"--kv_cache_dtype={kv_cache_dtype} cannot be held against {REFERENCE}; give one of {others}")
    KVCacheSpec(config.model, kv_cache_dtype)
    most = config.model.max_position_embeddings - QUESTION - VALUE
    if context > most:
        raise UserError(f"--contexts={context} and a question exceed the model's positions; give at most {most}")
