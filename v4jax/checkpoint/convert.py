"""Hugging Face weights to a v4jax checkpoint, or back: tensor by tensor, never the whole model in memory."""

from __future__ import annotations

import os
import pathlib

from v4jax.checkpoint import directory
from v4jax.checkpoint.model_io import open_checkpoint, write
from v4jax.checkpoint.tensors import TOKENIZER_NAME
from v4jax.core.check import UserError


def convert(
    source: str | os.PathLike, target: str | os.PathLike, format: str | None = None, dtype: str | None = None
) -> None:
    """Write the weights and the tokenizer of `source` as `target`; all of it or nothing.

    format: "huggingface" or "orbax"; None takes the one that the source is not. dtype: "float32" or "bfloat16" for
    the matrices, None keeps the stored types. Of a training run the newest checkpoint is taken. Raises UserError,
    also for a target that holds anything but an earlier result.
    """
    other = {"huggingface": "orbax", "orbax": "huggingface"}[directory.format_of(source)]
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"source and target are both {target}; choose another target")
    config, tensors = open_checkpoint(source, dtype)
    tokenizer_dir = source if (pathlib.Path(source) / TOKENIZER_NAME).is_file() else None
    write(target, format or other, config, tensors, tokenizer_dir)
