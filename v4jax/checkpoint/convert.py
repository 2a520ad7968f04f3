"""Conversion between Hugging Face and v4jax checkpoints, tensor by tensor, so that the model need not fit in memory."""

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
from v4jax.core.paths import local_path

_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Written:
    """Result of a conversion; `str()` is a one-line summary.

    Attributes:
        target: directory that was written.
        format: "huggingface" or "orbax".
        dtype: dtype of the model.
        files: {name: size in bytes}; a folder is one entry, "checkpoints/".
    """

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
    """Convert the checkpoint `source` to `target`, with the files beside the weights. On failure nothing changes.

    Tokenizer files, generation_config.json, chat templates, Python files, licenses and unknown fields of config.json
    are preserved in both directions (extra_files.py). The newest checkpoint of a training run is converted.

    Args:
        source: checkpoint directory of either format.
        target: directory to write.
        format: "huggingface" or "orbax"; None selects the format that the source does not have.
        dtype: "float32" or "bfloat16" for the matrices; None keeps the stored dtypes.
        overwrite: replace a non-empty target and keep none of its files.
        progress: show the progress on stderr.
        verify: compare the source with its checksums; False accepts data that differs from its checksum.

    Returns:
        A summary of the files that were written.

    Raises:
        UserError: the source is damaged, the disk is full, or the target is not empty and `overwrite` is False.
    """
    other = {"huggingface": "orbax", "orbax": "huggingface"}[directory.format_of(source)]
    format = other if format is None else format
    check_format(format)
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"source and target are both {target}; choose another target")
    path = local_path(target, "target")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise UserError(f"{target} is not empty; choose another target, or pass --overwrite to replace all of it")
    config, tensors = open_checkpoint(source, dtype, verify)
    with _Progress(tensors, show=progress) as counted:
        write(path, format, config, counted, companions=companions_of(source), replace_all=overwrite)
    return Written(str(target), format, config.model.dtype, _sizes(path))


class _Progress(LazyTensors):
    """Tensors of a checkpoint that count the bytes read, and show a bar on a terminal, or else lines on stderr."""

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
    """Return {name: size in bytes} of a directory. A subdirectory is one entry, such as "checkpoints/"."""
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
