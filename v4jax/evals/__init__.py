"""Floor 6: what a model is worth, measured."""

from __future__ import annotations

from v4jax.core.check import UserError
from v4jax.core.tables import write_json

SUITES = ("perplexity",)


def run(suite: str, checkpoint: str, json: str | None = None) -> list[dict]:
    """Run a suite on a checkpoint, print its table, and return its records; `json` also writes them to a file."""
    if suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}; one of {', '.join(SUITES)}")
    from v4jax.evals import perplexity

    records = perplexity.run(checkpoint)
    if json:
        write_json(json, records)
    return records
