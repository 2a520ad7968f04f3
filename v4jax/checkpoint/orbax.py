"""Checkpoints in orbax: the numbered steps of a training run. An exported model (export.py) is one step of weights.

Every step holds items, one orbax tree each, stored flat: {name: array}. The item `model` goes by the flat per-layer
names of models/layer_stacks.py, so that a step written from stacked layers fits an unrolled model; the leaves of other
items, such as an optimizer's state, are named by their place in the tree. `extras` is JSON. `checksums` covers all of
these.

A step is written to a temporary name and renamed when it is complete, so whatever stops a writer, the steps that have
their final name are good. Arrays are read by byte range, through tensorstore.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
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
from v4jax.checkpoint.lazy_tensors import LazyTensors, memory_dtype, report
from v4jax.checkpoint.path_alias import plain_path
from v4jax.checkpoint.step import (
    COMPLETE,
    WEIGHTS,
    StepItem,
    damaged,
    finished_steps,
    is_finished,
    read_sums,
    steps_path,
)
from v4jax.config import Config, Model
from v4jax.core import untrusted_json
from v4jax.core.atomic import require_space, write_error
from v4jax.core.errors import UserError
from v4jax.nn import qdq
from v4jax.parallel.distributed import barrier, is_primary

_EXTRAS = "extras"
_TEMPORARY = ".orbax-checkpoint-tmp"  # ends the name of a step that is being written
_LAST_WRITES = 6  # twentieths of a second in which what a failed save still writes is removed
_SYSTEM_ERROR = re.compile(r"os_error_code='(\d+)'")
_mxfp4 = jax.jit(qdq.mxfp4)


# --- training runs -----------------------------------------------------------------------------------------------


class TrainCheckpointer:
    """A training run's workdir as a checkpoint: v4jax.json, tokenizer, and the newest `keep` finished steps.

    tokenizer: anything with `save(directory)`, or None. A context manager; leaving it closes. Opening removes what an
    interrupted writer left. Raises UserError if the directory cannot be written or holds a run of another model.
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
        """Start to save; the arrays may be donated as soon as this returns. A step that is saved already is left.

        tree: {item: pytree of jax arrays}; `model` is a flat dict by `layout.to_flat`. extras: what json can hold.
        Steps must grow. Raises UserError if this save, or the one before, cannot be written; then the earlier
        checkpoints are good.
        """
        if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)):
            raise TypeError("a checkpoint holds jax arrays; put other values into the extras")
        items = {name: _flatten(item) for name, item in tree.items()}
        if any(name.startswith("stacks.") for name in items.get(WEIGHTS, ())):
            raise ValueError("the model is saved by flat names; pass it through layout.to_flat")
        for name in {_EXTRAS, checksums.DIRECTORY} & tree.keys():
            raise ValueError(f"an item of a checkpoint cannot be called {name!r}")
        json.dumps(extras)  # a mistake shows here and not in a thread
        self.wait()
        if step in self._manager.all_steps():
            return
        args = {name: ItemSave(flat) for name, flat in items.items() if flat}
        args[_EXTRAS] = ocp.args.JsonSave(dict(extras))
        with jax.transfer_guard("allow"):  # this is the place where a training loop means to fetch its arrays
            args[checksums.DIRECTORY] = _ChecksumsSave(_checksums(items, extras))
            self._guard(lambda: self._start(step, ocp.args.Composite(**args), jax.tree.leaves(tree)))

    def latest(self) -> int | None:
        """The newest finished step, or None."""
        return max(finished_steps(self._path.parent), default=None)

    def holds(self, step: int, item: str) -> bool:
        """Whether a finished step has this item."""
        return (self._path / str(step) / item).is_dir()

    def restore(self, step: int, abstract_tree: Mapping) -> tuple[dict, dict]:
        """The tree and the extras of a step.

        abstract_tree: like the saved tree or some of its items, its leaves with shape and dtype; a leaf goes to its
        sharding, or to the default device. Raises UserError if the step is missing, of another shape, or damaged.
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
            item = _open_matching(directory, name, wanted, sums)
            # One after another, and not by orbax, whose threads fill the terminal when a file is damaged.
            arrays = [_to_device(item, place, leaf) for place, leaf in wanted.items()]
            tree[name] = jax.tree.unflatten(jax.tree.structure(leaves), arrays)
        return tree, _read_extras(directory, sums.extras)

    def wait(self) -> None:
        """Return when the save under way is on disk. Raises UserError if it failed."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """`wait`, and end the threads."""
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
            for entry in self._path.iterdir():  # orbax parses these files without a limit of depth
                if entry.name.isdigit():
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
        """What an interrupted save or removal left; a removal leaves half a step under its final name."""
        if not is_primary():
            return []
        half = lambda entry: entry.name.isdigit() and not is_finished(entry)
        return [entry for entry in self._path.iterdir() if entry.name.endswith(_TEMPORARY) or half(entry)]

    def _start(self, step: int, args: ocp.args.Composite, leaves: list[jax.Array]) -> None:
        # Orbax prints tracebacks when it meets the end of the disk while writing; so that is rare.
        require_space(self._path, sum(leaf.nbytes for leaf in leaves))
        self._manager.save(step, args=args, force=True)

    def _guard(self, action: Callable[[], object]) -> None:
        """Run a part of saving; a full disk becomes a UserError and leaves a store that can go on."""
        try:
            action()
        except (OSError, ValueError) as error:
            cause = system_error(error)
            if cause is None:
                raise
            with contextlib.suppress(OSError, ValueError):  # closing tells of the same failure a second time
                self._manager.close()
            # The half-written step takes up the full disk, and other threads of orbax still write to it for a while.
            for _ in range(_LAST_WRITES):
                for directory in self._unfinished():
                    shutil.rmtree(directory, ignore_errors=True)
                time.sleep(0.05)
            self._open()  # anew, for a manager forgets its older steps when a save fails
            raise write_error(self._path, cause, "the earlier checkpoints are good") from error


def newest_extras(workdir: str | os.PathLike) -> dict | None:
    """The extras of the newest finished step of a run, None where there is no step; nothing is written.

    Raises:
        UserError: they are damaged.
    """
    steps = finished_steps(workdir)
    if not steps:
        return None
    directory = steps_path(workdir) / str(steps[-1])
    return _read_extras(directory, read_sums(directory).extras)


def _check_same_model(workdir: str | os.PathLike, old, new, path: str = "model") -> None:
    """Raise UserError naming the first field in which two configs differ."""
    for field in dataclasses.fields(old):
        was, now, name = getattr(old, field.name), getattr(new, field.name), f"{path}.{field.name}"
        if dataclasses.is_dataclass(was):
            _check_same_model(workdir, was, now, name)
        elif was != now:
            raise UserError(f"{workdir} holds a run with {name} = {was}, not {now}; use its config or another workdir")


def _checksums(items: Mapping[str, Mapping[str, jax.Array]], extras: Mapping) -> dict:
    """Content of this process' file of checksums."""
    sums = {name: checksums.of_shards(flat) for name, flat in items.items()}
    return checksums.to_json(sums, checksums.json_digest(extras), jax.process_count())


def _flatten(tree) -> dict[str, object]:
    """Leaves by their place in the tree, "a.0.b"; a flat dict stays what it is."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {jax.tree_util.keystr(path, simple=True, separator=".") or "value": leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the tree have the same name; rename one")
    return flat


# --- reading -----------------------------------------------------------------------------------------------------


class OrbaxTensors(LazyTensors):
    """Weights of the newest finished step of a v4jax directory.

    All names, shapes and types are checked at once, data is read when asked for. mxfp4: the experts were trained to be
    rounded to MXFP4, and are as they are read (again, if they were: it changes nothing). verify: compare what is read
    with its checksums. Raises UserError.
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
        wanted = {name: (tensor.shape, tensor.role == "index") for name, tensor in self._tensors.items()}
        found = {name: (store.shape, store.dtype.numpy_dtype.kind in "iu") for name, store in self._item.stores.items()}
        _report_difference(self._directory, found, wanted, lambda shape, integer: f"{list(shape)}{' int' * integer}")

    def dtype(self, name: str) -> np.dtype:
        return memory_dtype(self._tensors[name].role, self._item.stores[name].dtype.numpy_dtype, self._wanted)

    def read(self, name: str, leading: int | slice = slice(None)) -> np.ndarray:
        array = self._item.read(name, (leading,) if self._tensors[name].shape else ())
        if self._mxfp4 and ".experts." in name:
            array = np.asarray(_mxfp4(array))
        return array.astype(self.dtype(name), copy=False)


def _open_matching(
    directory: pathlib.Path, name: str, wanted: Mapping, sums: checksums.StepSums | None
) -> StepItem | None:
    """An item that holds exactly the wanted leaves; UserError if it holds others, None if none are wanted."""
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


def _to_device(item: StepItem, name: str, leaf) -> jax.Array:
    """Read an array onto the sharding of `leaf`, each shard by itself, or onto the default device."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jax.device_put(item.read(name))
    return jax.make_array_from_callback(tuple(leaf.shape), sharding, lambda index: item.read(name, index))


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


# --- orbax's manners ---------------------------------------------------------------------------------------------


def system_error(error: Exception) -> OSError | None:
    """The failed system call behind an error, or None; tensorstore tells of it in text."""
    if isinstance(error, OSError):
        return error
    match = _SYSTEM_ERROR.search(str(error))
    return OSError(int(match[1]), os.strerror(int(match[1]))) if match else None


def silence() -> None:
    """Keep orbax's log from the terminal: it reports every save, and every error that it raises several times over."""
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if _from_elsewhere not in logger.filters:
            logger.addFilter(_from_elsewhere)


def _from_elsewhere(record: logging.LogRecord) -> bool:
    frames = traceback.walk_tb(record.exc_info[2] if record.exc_info else None)
    files = [record.pathname, *(frame.f_code.co_filename for frame, _ in frames)]
    return record.levelno >= logging.CRITICAL or not any(f"{os.sep}orbax{os.sep}" in file for file in files)


class ItemHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of a tree, which also fails where orbax leaves a step without an index of its arrays."""

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        if not (directory / "manifest.ocdbt").exists():  # orbax skips this part in silence where it finds no files
            raise RuntimeError(f"orbax wrote no index of the arrays in {directory}")


@ocp.args.register_with_handler(ItemHandler, for_save=True, for_restore=True)
class ItemSave(ocp.args.PyTreeSave):
    pass


class _ChecksumsHandler(ocp.JsonCheckpointHandler):
    """Writes checksums/<process>.json, one file of each process."""

    def __init__(self):
        every_process = ocp.options.MultiprocessingOptions(primary_host=None)
        super().__init__(f"{jax.process_index()}.json", multiprocessing_options=every_process)


@ocp.args.register_with_handler(_ChecksumsHandler, for_save=True, for_restore=True)
class _ChecksumsSave(ocp.args.JsonSave):
    pass
