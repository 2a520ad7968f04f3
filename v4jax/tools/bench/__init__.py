"""`v4jax bench`: speed as ratios taken in one run, never as a promise."""

from __future__ import annotations

from v4jax.config import Config, load
from v4jax.core.check import UserError
from v4jax.core.tables import write_json

SUITES = ("kv", "peer", "train")


def run(
    suite: str,
    *,
    config: Config | None = None,
    checkpoint: str | None = None,
    rounds: int = 5,
    json: str | None = None,
    plot: str | None = None,
) -> list[dict]:
    """Run a suite, print its table, and return its records (see `report.record`); `json` also writes them to a file."""
    if suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}; one of {', '.join(SUITES)}")
    if checkpoint or plot:
        raise UserError(f"suite {suite!r} makes its own weights and draws no plot: drop --checkpoint and --plot")
    from v4jax.tools.bench import kv, peer, train

    config = config or load("small")
    records = kv.run(config) if suite == "kv" else {"peer": peer.run, "train": train.run}[suite](config, rounds)
    if json:
        write_json(json, records)
    return records
