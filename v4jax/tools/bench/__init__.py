"""`v4jax bench`: measures speed as ratios of variants that are interleaved in one run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from v4jax.config import Config, load
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path
from v4jax.core.reporting import write_json

# Suite, a module of this package -> the options that its `run` takes beside the config.
SUITES = {
    "decode": ("rounds", "contexts", "plot"),
    "eviction": (),
    "generate": ("rounds", "contexts"),
    "host_kv": ("rounds", "contexts", "plot", "checkpoint"),
    "kv": (),
    "serve": ("rounds",),
    "tiers": ("rounds", "contexts", "plot"),
    "train": ("rounds",),
    "vs_transformers": ("rounds",),
}


_NOT_TAKEN = {
    "checkpoint": "makes its own weights",
    "plot": "draws no plot",
    "contexts": "has lengths of its own",
}


def suites_with(option: str) -> list[str]:
    """Names of the suites that take an option."""
    return [suite for suite, options in SUITES.items() if option in options]


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
    options = {"rounds": rounds, "checkpoint": checkpoint, "contexts": contexts, "plot": plot}
    for option, cure in _NOT_TAKEN.items():
        if options[option] and option not in SUITES[suite]:
            raise UserError(f"suite {suite!r} {cure}: drop --{option}")
    for path in filter(None, (json, plot)):
        if not local_path(path, "file").parent.is_dir():  # reported now: some suites run for an hour
            raise UserError(f"there is no directory for {path}; create it first")
    if contexts:
        options["contexts"] = _lengths(contexts)
    given = {option: options[option] for option in SUITES[suite] if options[option]}
    records = importlib.import_module(f"v4jax.tools.bench.{suite}").run(config or load("small"), **given)
    if json:
        write_json(json, records)
    return records


def _lengths(contexts: Sequence[int | str]) -> list[int]:
    try:
        return [int(context) for context in contexts]
    except ValueError as error:
        raise UserError(f"--contexts={','.join(map(str, contexts))} are not numbers; such as 1024,4096") from error
