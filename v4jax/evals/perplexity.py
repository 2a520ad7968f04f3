"""Perplexity suite: nats per token and bits per byte of a checkpoint on held-out text."""

from __future__ import annotations

import math

import jax
import numpy as np

from v4jax import checkpoint as store
from v4jax.core.errors import UserError
from v4jax.core.reporting import print_table
from v4jax.data.pipeline import make_dataset
from v4jax.data.tokenizer import load_tokenizer
from v4jax.evals.heldout import config_of
from v4jax.train.loss import heldout_nll


def run(checkpoint: str, data: str = "", heldout: str = "") -> list[dict]:
    """Measure the next-token loss (without MTP) on held-out text, print a table and return its records.

    Args:
      checkpoint: Directory of the checkpoint.
      data: Files, as in `data.source` of a config. `data` or `heldout` is required if the checkpoint was trained on
        files.
      heldout: Held-out files, as in `data.heldout` of a config.

    Raises:
      UserError: The checkpoint has no tokenizer.json, or its text is not named.
    """
    config = config_of(checkpoint, data, heldout)
    tokenizer = load_tokenizer(checkpoint, config.model)
    if tokenizer is None:
        raise UserError(
            f"{checkpoint} has no tokenizer.json, without which text cannot be scored; put one beside the weights"
        )
    model, batches = store.load(checkpoint), make_dataset(config, tokenizer, "heldout", seed=0)
    score = jax.jit(heldout_nll)
    totals = jax.device_get([score(model, batch) for batch in batches])
    nll, count = (float(np.sum(column, dtype=np.float64)) for column in zip(*totals, strict=True))
    values = {
        "loss": (nll / count, "nats/token"),
        "bits_per_byte": (nll / math.log(2) / batches.num_bytes, "bits/byte"),
    }
    title = f"{config.name}: held-out text, {int(count):,} tokens, {batches.num_bytes:,} bytes"
    print_table(
        title, ["metric", "value", "unit"], [[name, f"{value:.4f}", unit] for name, (value, unit) in values.items()]
    )
    return [
        {
            "suite": "perplexity",
            "metric": name,
            "value": value,
            "unit": unit,
            "config": config.name,
            "context": config.data.seq_len,
        }
        for name, (value, unit) in values.items()
    ]
