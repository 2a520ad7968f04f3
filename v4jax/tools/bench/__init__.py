"""`v4jax bench`: measures speed as ratios of variants that are interleaved in one run."""

from __future__ import annotations

from collections.abc import Sequence

from v4jax.config import Config, load
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path
from v4jax.core.reporting import write_json

SUITES = ("decode", "eviction", "generate", "host_kv", "kv", "serve", "tiers", "train", "vs_transformers")
_WITH_CONTEXTS, _WITH_PLOT = ("decode", "generate", "host_kv", "tiers"), ("decode", "host_kv", "tiers")
_WITH_CHECKPOINT = ("host_kv",)


def run(
    suite: str,
    *,
    config: Config | None = None,
    checkpoint: str | None = None,
    rounds: int = 5,
    contexts: Sequence[int | str] = (),
    json: str | None = None,
    plot: str | None = None,
) -> list[dict]:
    """Run a suite, print its table, and return its records (see `report.record`); `json` also writes them to a file.

    contexts: lengths in tokens, for suites that go through several; none: the suite's own. plot: a PNG file to draw.
    """
    if suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}; one of {', '.join(SUITES)}")
    if checkpoint and suite not in _WITH_CHECKPOINT:
        raise UserError(f"suite {suite!r} makes its own weights: drop --checkpoint")
    if plot and suite not in _WITH_PLOT:
        raise UserError(f"suite {suite!r} draws no plot: drop --plot")
    if contexts and suite not in _WITH_CONTEXTS:
        raise UserError(f"suite {suite!r} has lengths of its own: drop --contexts")
    for path in filter(None, (json, plot)):
        if not local_path(path, "file").parent.is_dir():  # told now: some suites run for an hour
            raise UserError(f"there is no directory for {path}; create it first")
    from v4jax.tools.bench import decode, eviction, generate, host_kv, kv, serve, tiers, train, vs_transformers

    config = config or load("small")
    lengths = {"contexts": _lengths(contexts)} if contexts else {}
    suites = {
        "decode": lambda: decode.run(config, rounds, plot=plot, **lengths),
        "generate": lambda: generate.run(config, rounds, **lengths),
        "kv": lambda: kv.run(config),
        "host_kv": lambda: host_kv.run(config, rounds, checkpoint=checkpoint, plot=plot, **lengths),
        "vs_transformers": lambda: vs_transformers.run(config, rounds),
        "eviction": lambda: eviction.run(config),
        "serve": lambda: serve.run(config, rounds),
        "tiers": lambda: tiers.run(config, rounds, plot=plot, **lengths),
        "train": lambda: train.run(config, rounds),
    }
    records = suites[suite]()
    if json:
        write_json(json, records)
    return records


def _lengths(contexts: Sequence[int | str]) -> list[int]:
    try:
        return [int(context) for context in contexts]
    except ValueError as error:
        raise UserError(f"--contexts={','.join(map(str, contexts))} are not numbers; such as 1024,4096") from error
