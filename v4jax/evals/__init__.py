"""Quality evaluations of a checkpoint: perplexity, KV-cache quantization, and needles in haystacks."""

from __future__ import annotations

import importlib
import inspect

from v4jax.core.errors import UserError
from v4jax.core.paths import local_path
from v4jax.core.reporting import write_json

SUITES = ("kv_quant", "needle", "perplexity")
_TOLD = 4  # maximum number of violated bounds named in the error; the table shows all


def run(suite: str, checkpoint: str, json: str | None = None, **options) -> list[dict]:
    """Run a suite on a checkpoint, print its table, and return its records.

    Args:
      suite: One of `SUITES`.
      checkpoint: Directory of the checkpoint.
      json: File to which the records are written.
      **options: Options of the suite's own `run`.

    Raises:
      UserError: The suite or an option is unknown, or a bound does not hold. In the last case, the table is printed and
        the records are written first.
    """
    if suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}; one of {', '.join(SUITES)}")
    for name, path in {"checkpoint": checkpoint, "json": json, **options}.items():
        if name in ("checkpoint", "json", "data", "heldout") and path is not None:
            local_path(path, name)
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
