"""One finished step of a v4jax directory: where it lies, and its arrays, read by byte range and verified.

Arrays are stored as zarr chunks in an OCDBT database per item, which tensorstore reads. OCDBT protects its index with
checksums of its own but not the chunks, so every region that is read is compared with `checksums.py`.
"""

from __future__ import annotations

import errno
import os
import pathlib
import stat
from collections.abc import Iterator, Sequence

import numpy as np
import tensorstore

from v4jax.checkpoint import checksums
from v4jax.checkpoint.path_alias import plain_path
from v4jax.core import untrusted_json
from v4jax.core.errors import UserError

STEPS_NAME = "checkpoints"
WEIGHTS = "model"
_MANIFEST = "manifest.ocdbt"  # a few hundred bytes
_MAX_DENSITY = 1000  # bytes of arrays a byte of files may stand for; compressed weights take 1 to 2, zeros up to 10,000
_SLACK = 64 << 20  # bytes of arrays in small checkpoints, where all may be zeros
COMPLETE = "_CHECKPOINT_METADATA"  # orbax's file of a step; a step takes its final name after the last write to it


def finished_steps(path: str | os.PathLike) -> list[int]:
    """Steps of a v4jax directory whose checkpoint is complete, in order."""
    steps = steps_path(path)
    if not steps.is_dir():
        return []
    return sorted(int(entry.name) for entry in steps.iterdir() if entry.name.isdigit() and is_finished(entry))


def steps_path(path: str | os.PathLike) -> pathlib.Path:
    """Directory that holds the steps of a v4jax directory."""
    return pathlib.Path(os.path.realpath(path)) / STEPS_NAME


def is_finished(step: pathlib.Path) -> bool:
    """Whether the directory of a step is complete.

    The content of the marker file plays no part, so a damaged marker neither hides a step nor has it removed.
    """
    return (step / COMPLETE).is_file()


def damaged(step: pathlib.Path, what: str | Exception) -> UserError:
    """One line that names the damage and the way back to the step before."""
    cause = " ".join(str(what).split())[:300]
    earlier = [number for number in finished_steps(step.parent.parent) if number < int(step.name)]
    back = f"delete {step} to go back to step {earlier[-1]}, or copy" if earlier else "there is no earlier step; copy"
    return UserError(f"{step} is damaged ({cause}); {back} it again")


class StepItem:
    """The arrays of one item of a step: opened at once, read on demand.

    Attributes:
        stores: {name: tensorstore of the array}.

    Args:
        step: directory of the step.
        item: name of the item, such as "model".
        sums: checksums of the step; None reads without verification.

    Raises:
        UserError: the item cannot be opened.
    """

    def __init__(self, step: pathlib.Path, item: str, sums: checksums.StepSums | None):
        self._step, self._item, self._sums = step, item, sums
        self._files = plain_path(step) / item
        try:
            self.stores = _open(self._files, bounded=item == WEIGHTS)
        except (OSError, ValueError, AttributeError) as error:
            raise damaged(step, f"{item}: {error}") from error

    def read(self, name: str, index: Sequence[slice | int] = ()) -> np.ndarray:
        """`array[index]` of the array `name`; parts that are read are verified.

        Args:
            index: slices of step 1 or integers for the leading axes.

        Raises:
            UserError: the data cannot be read or differs from its checksum; names the array and the file.
        """
        store = self.stores[name]
        try:
            if self._sums is None:
                return store[tuple(index)].read().result() if index else store.read().result()
            sums = self._sums.of(self._item, name)
            region = [_region(axis, size) for axis, size in zip(index, store.shape, strict=False)]
            region += [slice(0, size) for size in store.shape[len(region) :]]
            box = sums.cover(region, store.shape)
            array = np.asarray(store[box].read().result())
            sums.verify(array, box)
        except checksums.Mismatch as error:
            raise damaged(self._step, f"{self._item}: {name} {error}{self._place(name)}") from error
        except (OSError, ValueError) as error:
            raise damaged(self._step, f"{self._item}: {name}: {error}{self._place(name)}") from error
        inside = (slice(r.start - b.start, r.stop - b.start) for r, b in zip(region, box, strict=True))
        drop = tuple(0 if isinstance(axis, int) else slice(None) for axis in index)
        return array[tuple(inside)][drop]

    def _place(self, name: str) -> str:
        """The files that hold an array, as the end of a message; empty where the index cannot be read."""
        try:
            base = tensorstore.KvStore.open(_base(self._files)).result()
            root = tensorstore.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]
            files = {file for key, file in _entries(base, root) if key.rpartition("/")[0] == name}
        except (OSError, ValueError, KeyError, IndexError):
            return ""
        return f", in {', '.join(sorted(files))}" if files else ""


def read_sums(step: pathlib.Path) -> checksums.StepSums:
    """The checksums of a step. Raises UserError if they are missing or incomplete."""
    try:
        return checksums.StepSums.read(step)
    except checksums.Mismatch as error:
        raise damaged(step, error) from error


def _region(axis: slice | int, size: int) -> slice:
    if isinstance(axis, slice):
        start, stop, _ = axis.indices(size)
        return slice(start, stop)
    position = range(size)[axis]
    return slice(position, position + 1)


def _base(item: pathlib.Path) -> dict:
    return {"driver": "file", "path": f"{item}/"}


def _open(item: pathlib.Path, bounded: bool) -> dict[str, tensorstore.TensorStore]:
    """The arrays of one item by name, unread.

    bounded: refuse arrays far larger than their files. Chunks without a file read as zeros, of any size.
    """
    metadata = untrusted_json.parse(untrusted_json.read_bytes(item / "_METADATA"))
    stored = _stored_bytes(item)
    (item / _MANIFEST).stat()  # tensorstore takes a missing one for an empty database
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    base = {"driver": "ocdbt", "base": _base(item)}
    marker = "/zarr.json" if driver == "zarr3" else "/.zarray"
    keys = [key.decode() for key in tensorstore.KvStore.open(base).result().list().result()]
    names = [key.removesuffix(marker) for key in keys if key.endswith(marker)]
    specs = {name: {"driver": driver, "kvstore": {**base, "path": f"{name}/"}} for name in names}
    context = tensorstore.Context()
    opened = {name: tensorstore.open(spec, context=context, open=True) for name, spec in specs.items()}
    stores = {name: future.result() for name, future in opened.items()}
    declared = sum(store.size * store.dtype.numpy_dtype.itemsize for store in stores.values())
    if bounded and declared > _MAX_DENSITY * stored + _SLACK:
        raise ValueError(f"{declared:,} bytes of arrays in {stored:,} bytes of files")
    return stores


def _stored_bytes(folder: pathlib.Path) -> int:
    """Bytes of all files below a folder.

    Raises OSError for a named pipe or a device, on which tensorstore would wait.
    """
    total = 0
    for directory, _, files in os.walk(folder):
        for name in files:
            status = os.stat(os.path.join(directory, name))
            # tensorstore reads the manifest at once, and ends the process if memory does not hold it.
            too_large = name == _MANIFEST and status.st_size > untrusted_json.LARGE
            if not stat.S_ISREG(status.st_mode) or too_large:
                raise OSError(errno.EINVAL, "no regular file of a possible size", os.path.join(directory, name))
            total += status.st_size
    return total


def _entries(base: tensorstore.KvStore, location: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, file) of everything in a node of an OCDBT index; what is stored inline lies in the file of the node."""
    node = tensorstore.ocdbt.dump(base, location).result()
    for entry in node["entries"]:
        if node["height"]:
            yield from _entries(base, entry["location"], prefix + entry["subtree_common_prefix"].decode())
        else:
            place = entry.get("indirect_value", location)  # value:<file>:<offset>:<length>, where the file holds a ":"
            yield prefix + entry["key"].decode(), place.split(":", 1)[1].rsplit(":", 2)[0].replace(":", "")
