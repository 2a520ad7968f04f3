"""Hugging Face weights to a v4jax checkpoint, or back: tensor by tensor, never the whole model in memory."""

from __future__ import annotations

import math
import os
import pathlib
import sys
import time
from dataclasses import dataclass

import numpy as np
import rich.progress as rp

from v4jax.checkpoint import directory
from v4jax.checkpoint.extra_files import companions_of
from v4jax.checkpoint.lazy_tensors import LazyTensors
from v4jax.checkpoint.model_io import check_format, open_checkpoint, write
from v4jax.core.errors import UserError

_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Written:
    """What a conversion wrote: the target, its format, the type of its model, and its files with their sizes."""

    target: str
    format: str
    dtype: str
    files: dict[str, int]

    def __str__(self) -> str:
        named = [name for name in self.files if not _is_shard(name)]
        shards = [name for name in self.files if _is_shard(name)]
        if shards:
            named.append(shards[0] if len(shards) == 1 else f"{len(shards)} files of weights")
        size = sum(self.files.values())
        return f"wrote {self.target} ({self.format}, {self.dtype}, {_megabytes(size)}): {', '.join(sorted(named))}"


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
    verify: bool = True,
) -> Written:
    """Write the weights of `source` as `target`, with all that lies beside them; all of it or nothing.

    Tokenizer files, generation_config.json, chat templates, Python files, licences and unknown fields of config.json
    survive in both directions (extra_files.py). Of a training run the newest checkpoint is taken.

    Args:
        format: "huggingface" or "orbax"; None takes the one that the source is not.
        dtype: "float32" or "bfloat16" for the matrices; None keeps the stored types.
        overwrite: replace a target that holds an earlier result, and keep nothing of it.
        progress: show how far it is, on stderr.
        verify: compare the source with its checksums; False also takes a damaged one.

    Raises:
        UserError: the source is damaged, the disk is full, or the target holds anything and is not to be overwritten.
    """
    other = {"huggingface": "orbax", "orbax": "huggingface"}[directory.format_of(source)]
    format = other if format is None else format
    check_format(format)
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"source and target are both {target}; choose another target")
    path = pathlib.Path(target)
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise UserError(f"{target} is not empty; choose another target, or pass --overwrite to replace all of it")
    config, tensors = open_checkpoint(source, dtype, verify)
    with _Progress(tensors, show=progress) as counted:
        write(path, format, config, counted, companions=companions_of(source), replace_all=overwrite)
    return Written(str(target), format, config.model.dtype, _sizes(path))


class _Progress(LazyTensors):
    """The tensors of a checkpoint, and how many bytes of them have been read: a bar on a terminal, lines elsewhere."""

    def __init__(self, tensors: LazyTensors, show: bool):
        super().__init__({name: tensors._tensors[name] for name in tensors})
        self._source = tensors
        self._total = sum(math.prod(self.shape(name)) * self.dtype(name).itemsize for name in self)
        self._done, self._printed = 0, time.monotonic()
        live = show and sys.stderr.isatty()
        self._lines = show and not live
        columns = (
            rp.TextColumn("{task.description}"),
            rp.BarColumn(),
            rp.DownloadColumn(),
            rp.TransferSpeedColumn(),
            rp.TimeRemainingColumn(),
        )
        self._bar = rp.Progress(*columns, console=rp.Console(stderr=True), disable=not live)
        self._task = self._bar.add_task("converting", total=self._total)

    def __enter__(self) -> _Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.__exit__(*exception)

    def dtype(self, name: str) -> np.dtype:
        return self._source.dtype(name)

    def read(self, name: str, leading: int | slice = slice(None)) -> np.ndarray:
        array = self._source.read(name, leading)
        self._done += array.nbytes
        self._bar.update(self._task, completed=self._done)
        if self._lines and time.monotonic() - self._printed > _REPORT_SECONDS:
            self._printed = time.monotonic()
            print(f"converting: {_megabytes(self._done)} of {_megabytes(self._total)}", file=sys.stderr, flush=True)
        return array


def _sizes(path: pathlib.Path) -> dict[str, int]:
    """Bytes by name; a folder counts as one entry, "checkpoints/"."""
    sizes = {}
    for item in sorted(path.iterdir()):
        if item.is_dir():
            sizes[f"{item.name}/"] = sum(file.stat().st_size for file in item.rglob("*") if file.is_file())
        else:
            sizes[item.name] = item.stat().st_size
    return sizes


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors")


def _megabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
