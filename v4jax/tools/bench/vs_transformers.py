"""Suite `vs_transformers`: v4jax and transformers in turn, with the same weights and tokens on the same machine.

Each runs in a process of its own, because in one process the threads and heaps of torch and XLA slow each other.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile

import numpy as np

from v4jax.config import Config
from v4jax.core.reporting import print_table
from v4jax.tools.bench.measure import interleave
from v4jax.tools.bench.report import record
from v4jax.tools.bench.subprocess_runner import Ask, remote
from v4jax.tools.bench.transformers_runner import TransformersRunner
from v4jax.tools.bench.v4jax_runner import V4JaxRunner

PREFILL, DECODED, ROWS = (2048, 8192), 32, 4
OURS, THEIRS = "v4jax", "transformers"


def run(config: Config, rounds: int) -> list[dict]:
    """Training step, prefill and decode of `config.model` in float32; prints a table of ratios.

    Both train with AdamW on all parameters, cross-entropy alone; both prefill whole prompts and decode greedily with
    their caches. Times are medians of `rounds` rounds, the long prefill of at most 2. Raises UserError.
    """
    model = dataclasses.replace(config.model, dtype="float32", num_nextn_predict_layers=0, kv_qdq=False)
    serve = dataclasses.replace(config.serve, max_num_seqs=1, max_model_len=2 * max(PREFILL))
    config = dataclasses.replace(config, model=model, serve=serve)
    rng = np.random.default_rng(0)
    tokens = lambda rows, length: rng.integers(2, model.vocab_size, (rows, length))
    seconds: dict[tuple[str, int], dict[str, list[float]]] = {}
    with (
        tempfile.TemporaryDirectory() as weights,
        remote(THEIRS, TransformersRunner) as theirs,  # first, because torch may be missing
        remote(OURS, V4JaxRunner, config, weights, heap=True) as ours,
    ):
        theirs("load", weights)
        arms = {OURS: ours, THEIRS: theirs}
        sample = tokens(1, 256)
        difference, limits = _difference(ours("logits", sample), theirs("logits", sample)), ours("machine")
        rates = f"{limits['flops_per_second'] / 1e9:.0f} GFLOP/s, {limits['bytes_per_second'] / 1e9:.0f} GB/s"
        print(f"largest logit difference {difference:.1e} of the logit spread; this machine: {rates}", flush=True)
        for length in PREFILL:
            short = length == min(PREFILL)
            taken = _generation(arms, tokens, length, rounds if short else min(rounds, 2), [OURS, *[THEIRS] * short])
            seconds["prefill", length] = {name: [prefill for prefill, _ in values] for name, values in taken.items()}
            seconds["decode", length] = {name: [decode for _, decode in values] for name, values in taken.items()}
        length = config.data.seq_len
        rows = tokens(ROWS, length + 1)
        for arm in arms.values():
            arm("prepare_training", rows)
            arm("step")
        seconds["train", length] = interleave({name: lambda arm=arm: arm("step") for name, arm in arms.items()}, rounds)
    return _report(config, seconds, limits)


def _difference(ours_BTV: np.ndarray, theirs_BTV: np.ndarray) -> float:
    return float(np.abs(ours_BTV - theirs_BTV).max() / theirs_BTV.std())


def _generation(arms: dict[str, Ask], tokens, length: int, rounds: int, warm: list[str]) -> dict[str, list]:
    """Time generation of each arm, `rounds` times in turn, after one untimed call of the arms in `warm`.

    Every round has a new prompt, because an engine may have cached the prefix of an old one.

    Returns:
      For each arm, one (seconds to the first token, seconds per token after it) per round.
    """
    first, *others = tokens(1 + rounds, length).tolist()
    for name in warm:
        arms[name]("generate", first, DECODED)

    def timed(arm):
        prompts = iter(others)
        return lambda: arm("generate", next(prompts), DECODED)

    return interleave({name: timed(arm) for name, arm in arms.items()}, rounds)


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
            records.append(record("vs_transformers", f"{what}_time", [v * scale for v in values], unit, arm=name, **at))
        records.append(record("vs_transformers", f"{what}_speedup", ratios, "ratio", arm=f"{THEIRS}/{OURS}", **at))
    for name, value in limits.items():
        records.append(record("vs_transformers", name, [value], name.split("_")[0] + "/s", config="machine"))
    print_table(
        f"{config.name}, float32, {os.cpu_count()} CPU threads", ["what", "tokens", OURS, THEIRS, "speed-up"], rows
    )
    return records
