"""What a model is worth, measured."""

from __future__ import annotations

import importlib
import inspect

from v4jax.core.errors import UserError
from v4jax.core.reporting import write_json

SUITES = ("kv_quant", "needle", "perplexity")
_TOLD = 4  # broken bounds that the last line names; the table shows all


def run(suite: str, checkpoint: str, json: str | None = None, **options) -> list[dict]:
    """Run a suite on a checkpoint, print its table, and return its records; `json` also writes them to a file.

    options: of the suite's own `run`. Raises UserError, after all that, if a bound of the suite does not hold.
    """
    if suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}; one of {', '.join(SUITES)}")
    home = importlib.import_module(f"v4jax.evals.{suite}")
    for name in options:
        if name not in inspect.signature(home.run).parameters:
            raise UserError(f"suite {suite!r} has no --{name}; drop it")
    records = home.run(checkpoint, **options)
    if json:
        write_json(json, records)
    broken = [f"{r['metric']} {r['value']:.3g} (bound {r['bound']:g})" for r in records if not r.get("holds", True)]
    if broken:
        more = f" and {len(broken) - _TOLD} more" if len(broken) > _TOLD else ""
        raise UserError(f"suite {suite!r}: beyond its bounds: {', '.join(broken[:_TOLD])}{more}")
    return records
