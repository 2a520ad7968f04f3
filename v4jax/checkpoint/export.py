"""Export of a model to a v4jax directory with one orbax step, written tensor by tensor."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp

from v4jax.checkpoint import checksums
from v4jax.checkpoint.directory import CONFIG_NAME, config_text
from v4jax.checkpoint.extra_files import Companions
from v4jax.checkpoint.lazy_tensors import described, memory_dtype, tokenizer_files
from v4jax.checkpoint.orbax import ItemHandler, ItemSave, silence, system_error
from v4jax.checkpoint.path_alias import plain_path
from v4jax.checkpoint.step import STEPS_NAME, WEIGHTS, StepItem, finished_steps, steps_path
from v4jax.config import Config
from v4jax.core import dtypes
from v4jax.core.atomic import replace_directory, require_space, write_text
from v4jax.core.errors import UserError

_CHUNK_BYTES = 64 * 1024 * 1024  # chunk size; a reader must read a chunk in full
_BATCH_BYTES = 32 * 1024 * 1024  # a batch of tensors is written as soon as it reaches this size


def write_orbax(
    path: str | os.PathLike,
    config: Config,
    flat: Mapping[str, np.ndarray],
    tokenizer_dir: str | os.PathLike | None = None,
    dtype=None,
    companions: Companions | None = None,
    replace_all: bool = False,
) -> None:
    """Write a v4jax directory with one step, number 0, that holds only weights. On failure the target is unchanged.

    All arrays are read back and compared with the arrays in memory before the directory gets its final name.

    Args:
        path: target directory.
        config: config to store in v4jax.json.
        flat: arrays (numpy, jax or lazy) by flat name, exactly those of `config.model`. They are fetched one at a time.
        tokenizer_dir: as in `write_hf`.
        dtype: dtype of the matrices; None keeps the dtype of each array.
        companions: as in `write_hf`.
        replace_all: as in `write_hf`.

    Raises:
        UserError: the tensors do not fit the config, the disk is full or returns other data, or the target is a
            training run or not a model directory.
    """
    wanted = None if dtype is None else dtypes.weight_dtype(dtype)
    pending = {}
    for name, (tensor, given) in described(config.model, flat, path).items():
        stored = memory_dtype(tensor.role, given, wanted)
        load = lambda name=name, stored=stored: np.ascontiguousarray(np.asarray(flat[name]).astype(stored, copy=False))
        if math.prod(tensor.shape):  # orbax cannot store an array without elements
            pending[name] = _Pending(tensor.shape, stored, load)
    _refuse_run(path)
    copies, companions = tokenizer_files(tokenizer_dir), companions or Companions()
    with replace_directory(path, CONFIG_NAME, lambda name: replace_all or name == STEPS_NAME) as directory:
        require_space(directory, sum(tensor.nbytes for tensor in pending.values()))
        for target, source in copies.items():
            shutil.copyfile(source, directory / target)
        companions.copy_to(directory)
        try:
            _write_step(plain_path(directory) / STEPS_NAME, pending)
        except ValueError as error:
            if (cause := system_error(error)) is None:
                raise
            raise cause from error
        files = checksums.of_files(directory, sorted(file.name for file in directory.iterdir()))
        write_text(directory / CONFIG_NAME, config_text(config, files, companions.fields))


def _write_step(path: pathlib.Path, pending: dict[str, _Pending]) -> None:
    silence()
    written: dict[str, str] = {}
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()), (_Pending, _PendingHandler(written))
    )
    handlers = {WEIGHTS: ItemHandler(type_handler_registry=registry)}
    chunked = dict.fromkeys(pending, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES))
    args = ocp.args.Composite(**{WEIGHTS: ItemSave(pending, save_args=chunked)})
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(path, item_handlers=handlers, options=options) as manager:
        manager.save(0, args=args)
    _write_checksums(path / "0", written)


def _write_checksums(step: pathlib.Path, written: dict[str, str]) -> None:
    """Read every array back, compare it with its checksum from memory, and write the checksums of its chunks."""
    item, sums = StepItem(step, WEIGHTS, None), {}
    for name, digest in written.items():
        array = item.read(name)
        if checksums.digest(array) != digest:
            raise UserError(f"{step}: {name} was not written as it is in memory; choose another disk")
        sums[name] = checksums.of_array(array, item.stores[name].chunk_layout.read_chunk.shape)
    content = json.dumps(checksums.to_json({WEIGHTS: sums}, None, 1))
    (step / checksums.DIRECTORY).mkdir()
    write_text(step / checksums.DIRECTORY / "0.json", content)


def _refuse_run(path: str | os.PathLike) -> None:
    """Raise UserError if `path` is a training run. An export would delete its optimizer state."""
    for step in finished_steps(path):
        items = {entry.name for entry in (steps_path(path) / str(step)).iterdir() if entry.is_dir()}
        if items - {checksums.DIRECTORY} != {WEIGHTS}:
            raise UserError(f"{path} is a training run; choose an empty or a new directory")


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A tensor that `load` fetches when it is written. The other attributes are those that orbax needs of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class _PendingHandler(ocp.type_handlers.NumpyHandler):
    """Orbax type handler that loads and writes `_Pending` tensors in batches, so that they need not all fit in memory.

    Args:
        written: dict to which the handler adds {name: checksum} of every array.
    """

    def __init__(self, written: dict[str, str]):
        super().__init__(deepcopy_host_arrays=False)
        self._written = written

    async def serialize(self, values, infos, args=None):
        start, size = 0, 0
        for stop, value in enumerate(values, 1):
            size += value.nbytes
            if size >= _BATCH_BYTES or stop == len(values):
                batch = slice(start, stop)
                loaded = [pending.load() for pending in values[batch]]
                names = [info.name for info in infos[batch]]
                self._written.update(zip(names, checksums.digests(loaded), strict=True))
                for future in await super().serialize(loaded, infos[batch], args[batch]):
                    await asyncio.to_thread(future.result)
                del loaded  # free this batch before the next one is loaded
                start, size = stop, 0
        return []
