"""Orbax checkpoints: the numbered steps of a training run. An exported model (export.py) is a single step of weights.

A step holds several items. Each item is one orbax tree, stored flat as {name: array}. The item `model` uses the flat
per-layer names of models/layer_stacks.py, so a step written from stacked layers also fits an unrolled model. The leaves
of other items, such as the optimizer state, are named by their path in the tree. The item `extras` is JSON. The item
`checksums` covers all the others.

Orbax writes a step under a temporary name and renames it once it is complete. A crash at any moment therefore leaves
every step with a final name intact. Arrays are read by byte range through tensorstore.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import time
import traceback
from collections.abc import Callable, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from v4jax.checkpoint import checksums, param_mapping
from v4jax.checkpoint.directory import CONFIG_NAME, read_config, save_config
from v4jax.checkpoint.lazy_tensors import FLOAT32, LazyTensors, memory_dtype, report
from v4jax.checkpoint.path_alias import plain_path
from v4jax.checkpoint.step import (
    COMPLETE,
    WEIGHTS,
    StepItem,
    damaged,
    finished_steps,
    is_finished,
    is_step,
    read_sums,
    steps_path,
)
from v4jax.config import Config, Model
from v4jax.core import untrusted_json
from v4jax.core.atomic import require_space, write_error
from v4jax.core.errors import UserError
from v4jax.nn import qdq
from v4jax.parallel.distributed import all_gather_bytes, barrier, is_primary

_EXTRAS = "extras"
_TEMPORARY = ".orbax-checkpoint-tmp"  # suffix of the directory name while a step is being written
_LAST_WRITES = 6  # cleanup rounds of 50 ms after a failed save, while threads of orbax may still write
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
_mxfp4 = jax.jit(qdq.mxfp4)


# --- training runs -----------------------------------------------------------------------------------------------


class TrainCheckpointer:
    """Saves and restores the steps of a training run in its workdir.

    The workdir holds v4jax.json, the tokenizer and the newest `keep` finished steps. Opening it deletes the unfinished
    steps of an interrupted writer. The class is a context manager, and leaving it calls `close`.

    Args:
        workdir: directory of the run; created if it does not exist.
        config: config of the run, written to v4jax.json.
        tokenizer: any object with a method `save(directory)`, or None.
        keep: number of finished steps to keep; older ones are deleted.

    Raises:
        UserError: the directory cannot be written, holds a run of another model, or has a damaged step.
    """

    def __init__(self, workdir: str | os.PathLike, config: Config, tokenizer=None, *, keep: int):
        self._path = steps_path(workdir)
        self._keep = keep
        if finished_steps(workdir) and (self._path.parent / CONFIG_NAME).is_file():
            _check_same_model(workdir, read_config(workdir).model, config.model)
        if is_primary():
            save_config(workdir, config, tokenizer)
        silence()
        self._open()

    def __enter__(self) -> TrainCheckpointer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def save(self, step: int, tree: Mapping, extras: Mapping) -> None:
        """Start an asynchronous save of one step.

        The arrays may be donated as soon as this method returns. A step that is already saved is not written again.

        Args:
            step: number of the step; steps must be saved in increasing order.
            tree: {item: pytree of jax arrays}; the item `model` is a flat dict of per-layer names
                (models/layer_stacks.py).
            extras: JSON values to store with the arrays; NaN and infinities are not JSON.

        Raises:
            UserError: this save or the previous one cannot be written; the earlier checkpoints are intact.
            TypeError: a leaf of `tree` is not a jax array, or `extras` is not JSON.
            ValueError: `model` has stacked names, an item has a reserved name, or `extras` holds NaN or an infinity.
        """
        if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):
            raise TypeError("a checkpoint holds jax arrays; put other values into the extras")
        items = {name: _with_elements(_flatten(item)) for name, item in tree.items()}
        if any(name.startswith("stacks.") for name in items.get(WEIGHTS, ())):
            raise ValueError("the model is saved by flat names; pass it through layer_stacks.to_layer_dict")
        for name in {_EXTRAS, checksums.DIRECTORY} & tree.keys():
            raise ValueError(f"an item of a checkpoint cannot be called {name!r}")
        json.dumps(extras, allow_nan=False)  # raises here rather than in a thread of orbax
        self.wait()
        if step in self._manager.all_steps():
            return
        args = {name: ItemSave(flat) for name, flat in items.items() if flat}
        args[_EXTRAS] = ocp.args.JsonSave(dict(extras))
        with jax.transfer_guard("allow"):  # saving is an intended device-to-host transfer
            args[checksums.DIRECTORY] = _ChecksumsSave(_checksums(items, extras))
            self._guard(lambda: self._start(step, ocp.args.Composite(**args), jax.tree.leaves(tree)))

    def latest(self) -> int | None:
        """Return the number of the newest finished step, or None if there is none."""
        return max(finished_steps(self._path.parent), default=None)

    def holds(self, step: int, item: str) -> bool:
        """Return whether the directory of step `step` contains the item `item`."""
        return (self._path / str(step) / item).is_dir()

    def restore(self, step: int, abstract_tree: Mapping) -> tuple[dict, dict]:
        """Read one step.

        Args:
            step: number of a finished step.
            abstract_tree: {item: pytree} with all or some items of the saved tree. Each leaf has `shape` and `dtype`.
                If a leaf has a `sharding`, its array is restored to that sharding, else to the default device.

        Returns:
            The tree with arrays as leaves, and the extras.

        Raises:
            UserError: the step is missing or damaged, or its arrays have other names, shapes or dtypes.
        """
        directory = self._path / str(step)
        if not is_finished(directory):
            raise UserError(
                f"{self._path} has no finished checkpoint of step {step}; "
                f"finished: {finished_steps(self._path.parent) or 'none'}"
            )
        tree = {}
        sums = read_sums(directory)
        for name, leaves in abstract_tree.items():
            wanted = _flatten(leaves)
            item = _open_matching(directory, name, _with_elements(wanted), sums)
            # Read one array at a time, without orbax: its threads flood the terminal when a file is damaged.
            arrays = [_to_device(item, place, leaf) for place, leaf in wanted.items()]
            tree[name] = jax.tree.unflatten(jax.tree.structure(leaves), arrays)
        return tree, _read_extras(directory, sums.extras)

    def wait(self) -> None:
        """Block until the pending save is on disk. Raises UserError if it failed."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Call `wait`, then stop the threads of orbax."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _open(self) -> None:
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            for directory in self._unfinished():
                shutil.rmtree(directory)
            barrier("checkpoints cleared")
            for entry in self._path.iterdir():  # check first: orbax parses these files without a nesting limit
                if is_step(entry):
                    untrusted_json.parse(untrusted_json.read_bytes(entry / COMPLETE))
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep)
            self._manager = ocp.CheckpointManager(plain_path(self._path), options=options)
        except OSError as error:
            raise write_error(self._path, error, "nothing was saved") from error
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
            raise UserError(
                f"the metadata of a step in {self._path} is damaged ({error}); remove its step to go on from an "
                "earlier one, or copy it again"
            ) from error

    def _unfinished(self) -> list[pathlib.Path]:
        """Return the directories that an interrupted save or deletion left.

        An interrupted deletion leaves an incomplete step under its final name. The list is empty except on the primary
        process.
        """
        if not is_primary():
            return []
        half = lambda entry: is_step(entry) and not is_finished(entry)
        return [entry for entry in self._path.iterdir() if entry.name.endswith(_TEMPORARY) or half(entry)]

    def _start(self, step: int, args: ocp.args.Composite, leaves: list[jax.Array]) -> None:
        # Check the free space first, because orbax prints tracebacks when the disk fills up during a write. If one
        # process has no space, none of them starts to write.
        code = 0
        try:
            require_space(self._path, sum(leaf.nbytes for leaf in leaves))
        except OSError as error:
            code = error.errno
        if code := max(map(int, all_gather_bytes(str(code).encode()))):
            raise OSError(code, os.strerror(code))
        self._manager.save(step, args=args, force=True)

    def _guard(self, action: Callable[[], object]) -> None:
        """Run one stage of a save and turn a failed system call, such as a full disk, into a UserError.

        In a run of one process the checkpointer stays usable: the unfinished step is deleted and the manager is opened
        again.
        """
        try:
            action()
        except (OSError, ValueError) as error:
            cause = system_error(error)
            if cause is None:
                raise
            failure = write_error(self._path, cause, "the earlier checkpoints are good")
            if jax.process_count() > 1:  # opening again needs all processes, and the others may not have failed
                raise failure from error
            with contextlib.suppress(OSError, ValueError):  # close() raises the same failure again
                self._manager.close()
            # Delete the unfinished step, which occupies the full disk. Threads of orbax still write to it for a while.
            for _ in range(_LAST_WRITES):
                for directory in self._unfinished():
                    shutil.rmtree(directory, ignore_errors=True)
                time.sleep(0.05)
            self._open()  # open a new manager, because a manager loses track of its older steps when a save fails
            raise failure from error


def newest_extras(workdir: str | os.PathLike) -> dict | None:
    """Read the extras of the newest finished step of a run without writing to its workdir.

    Returns:
        The extras, or None if the run has no finished step.

    Raises:
        UserError: the extras or the checksums of the step are damaged, or the step is an exported model.
    """
    steps = finished_steps(workdir)
    if not steps:
        return None
    directory = steps_path(workdir) / str(steps[-1])
    sums = read_sums(directory)
    if sums.extras is None:
        raise UserError(f"{workdir} holds an exported model, which has no place in its data; train in another workdir")
    return _read_extras(directory, sums.extras)


def _check_same_model(workdir: str | os.PathLike, old, new, path: str = "model") -> None:
    """Raise UserError naming the first field in which two configs differ."""
    for field in dataclasses.fields(old):
        was, now, name = getattr(old, field.name), getattr(new, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(was):
            _check_same_model(workdir, was, now, name)
        elif was != now:
            raise UserError(f"{workdir} holds a run with {name} = {was}, not {now}; use its config or another workdir")


def _checksums(items: Mapping[str, Mapping[str, jax.Array]], extras: Mapping) -> dict:
    """Return the content of this process's file `checksums/<process>.json`."""
    sums = {name: checksums.of_shards(flat) for name, flat in items.items()}
    return checksums.to_json(sums, checksums.json_digest(extras), jax.process_count())


def _flatten(tree) -> dict[str, object]:
    """Map each leaf's path in the tree, such as "a.0.b", to the leaf. A flat dict keeps its names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {jax.tree_util.keystr(path, simple=True, separator=".") or "value": leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the tree have the same name; rename one")
    return flat


def _with_elements(flat: Mapping) -> dict:
    """Drop arrays without elements, such as shared experts of a model that has none: orbax cannot store them."""
    return {name: leaf for name, leaf in flat.items() if leaf.size}


# --- reading -----------------------------------------------------------------------------------------------------


class OrbaxTensors(LazyTensors):
    """Weights of the newest finished step of a v4jax directory, read on demand.

    The constructor checks all names, shapes and whether each dtype is integral. It reads no data.

    Args:
        path: v4jax directory.
        model: config of the model that the step must fit.
        dtype: dtype of the matrices in memory; None keeps the stored dtype.
        mxfp4: round the routed experts to MXFP4 on reading, as training with `expert_weight_format="mxfp4"` does.
            Rounding weights that are already rounded does not change them.
        verify: compare everything that is read with its checksums.

    Raises:
        UserError: there is no finished step, or the step does not fit `model` or is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        model: Model,
        dtype: np.dtype | None = None,
        mxfp4: bool = False,
        verify: bool = True,
    ):
        super().__init__(param_mapping.tensors(model))
        steps = finished_steps(path)
        if not steps:
            raise UserError(f"{path} has no finished checkpoint; train until the first one is saved, or copy it again")
        self._directory, self._wanted, self._mxfp4 = steps_path(path) / str(steps[-1]), dtype, mxfp4
        self._item = StepItem(self._directory, WEIGHTS, read_sums(self._directory) if verify else None)
        stored = {name: tensor for name, tensor in self._tensors.items() if math.prod(tensor.shape)}
        wanted = {name: (tensor.shape, tensor.role == "index") for name, tensor in stored.items()}
        found = {name: (store.shape, store.dtype.numpy_dtype.kind in "iu") for name, store in self._item.stores.items()}
        _report_difference(self._directory, found, wanted, lambda shape, integer: f"{list(shape)}{' int' * integer}")

    def dtype(self, name: str) -> np.dtype:
        store = self._item.stores.get(name)  # None for an array without elements
        return memory_dtype(self._tensors[name].role, store.dtype.numpy_dtype if store else FLOAT32, self._wanted)

    def read(self, name: str, leading: int | slice = slice(None)) -> np.ndarray:
        if name not in self._item.stores:
            return np.zeros(self._tensors[name].shape, self.dtype(name))[leading]
        array = self._item.read(name, (leading,) if self._tensors[name].shape else ())
        if self._mxfp4 and ".experts." in name:
            array = np.asarray(_mxfp4(array))
        return array.astype(self.dtype(name), copy=False)


def _open_matching(
    directory: pathlib.Path, name: str, wanted: Mapping, sums: checksums.StepSums | None
) -> StepItem | None:
    """Open the item `name` of a step.

    Args:
        directory: directory of the step.
        name: name of the item.
        wanted: {name: leaf with `shape` and `dtype`}, the arrays that the item must hold.
        sums: checksums of the step; None reads without verification.

    Returns:
        The item, or None if `wanted` is empty.

    Raises:
        UserError: the item is missing, or its arrays are not exactly those of `wanted`.
    """
    if not wanted:
        return None
    if not (directory / name).is_dir():
        raise UserError(f"{directory} holds no {name!r}; a run can be resumed only from a checkpoint of a run")
    item = StepItem(directory, name, sums)
    _report_difference(
        directory,
        {name: (store.shape, store.dtype.numpy_dtype) for name, store in item.stores.items()},
        {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in wanted.items()},
        lambda shape, dtype: f"{dtype.name}{list(shape)}",
    )
    return item


def _to_device(item: StepItem | None, name: str, leaf) -> jax.Array:
    """Read the array `name` shard by shard onto the sharding of `leaf`, or onto the default device if it has none."""
    sharding = getattr(leaf, "sharding", None)
    read = functools.partial(item.read, name) if leaf.size else np.zeros(leaf.shape, leaf.dtype).__getitem__
    if sharding is None:
        return jax.device_put(read(()))
    return jax.make_array_from_callback(tuple(leaf.shape), sharding, read)


def _report_difference(directory: pathlib.Path, found: dict, wanted: dict, describe: Callable[..., str]) -> None:
    report(
        f"{directory} does not fit the config",
        missing=[name for name in wanted if name not in found],
        unexpected=[name for name in found if name not in wanted],
        wrong=[
            f"{name} {describe(*found[name])} instead of {describe(*wanted[name])}"
            for name in wanted
            if name in found and found[name] != wanted[name]
        ],
        cure="use the config it was trained with, or another directory",
    )


def _read_extras(directory: pathlib.Path, digest: str | None) -> dict:
    try:
        extras = untrusted_json.parse(untrusted_json.read_bytes(directory / _EXTRAS / "metadata"))
    except (OSError, ValueError) as error:
        raise damaged(directory, f"{_EXTRAS}: {error}") from error
    if checksums.json_digest(extras) != digest:
        raise damaged(directory, f"{_EXTRAS}/metadata differs from its checksum")
    return extras


# --- workarounds for orbax ---------------------------------------------------------------------------------------


def system_error(error: Exception) -> OSError | None:
    """Return the OSError behind an error, or None. Tensorstore reports errno only in the text of a ValueError."""
    if isinstance(error, OSError):
        return error
    match = _SYSTEM_ERROR.search(str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def silence() -> None:
    """Drop orbax's log records below CRITICAL: orbax logs every save, and logs each error several times."""
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if _from_elsewhere not in logger.filters:
            logger.addFilter(_from_elsewhere)


def _from_elsewhere(record: logging.LogRecord) -> bool:
    frames = traceback.walk_tb(record.exc_info[2] if record.exc_info else None)
    files = [record.pathname, *(frame.f_code.co_filename for frame, _ in frames)]
    return record.levelno >= logging.CRITICAL or not any(f"{os.sep}orbax{os.sep}" in file for file in files)


class ItemHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's PyTree handler that raises RuntimeError if the step has no index of its arrays."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        if not (directory / "manifest.ocdbt").exists():  # orbax silently skips merging the index if it finds no files
            raise RuntimeError(f"orbax wrote no index of the arrays in {directory}")


@ocp.args.register_with_handler(ItemHandler, for_save=True, for_restore=True)
class ItemSave(ocp.args.PyTreeSave):
    pass


class _ChecksumsHandler(ocp.JsonCheckpointHandler):
    """Orbax's JSON handler with one file per process, checksums/<process>.json."""

    def __init__(self):
        every_process = ocp.options.MultiprocessingOptions(primary_host=None)
        super().__init__(f"{jax.process_index()}.json", multiprocessing_options=every_process)


@ocp.args.register_with_handler(_ChecksumsHandler, for_save=True, for_restore=True)
class _ChecksumsSave(ocp.args.JsonSave):
    pass
