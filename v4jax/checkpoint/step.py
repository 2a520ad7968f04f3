"""Finished steps of a v4jax directory: their paths, and their arrays, which are read by byte range and verified.

Each item stores its arrays as zarr chunks in one OCDBT database, which tensorstore reads. OCDBT has checksums for its
index but not for the chunks, so every region that is read is compared with the checksums of `checksums.py`.
"""

from __future__ import annotations

import errno
import os
import pathlib
import re
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
# Largest allowed ratio of array bytes to file bytes. It is 1 to 2 for compressed weights and up to 10,000 for zeros.
_MAX_DENSITY = 1000
_SLACK = 64 << 20  # array bytes allowed beyond that ratio, for small checkpoints that may be all zeros
COMPLETE = "_CHECKPOINT_METADATA"  # orbax's marker file; orbax renames a step to its final name after writing it


def finished_steps(path: str | os.PathLike) -> list[int]:
    """Return the numbers of the complete steps of a v4jax directory, in ascending order."""
    steps = steps_path(path)
    if not steps.is_dir():
        return []
    return sorted(int(entry.name) for entry in steps.iterdir() if is_step(entry) and is_finished(entry))


def steps_path(path: str | os.PathLike) -> pathlib.Path:
    """Return the absolute path of the subdirectory that holds the steps of a v4jax directory."""
    return pathlib.Path(os.path.realpath(path)) / STEPS_NAME


def is_step(entry: pathlib.Path) -> bool:
    """Return whether the name of a directory is a step number as orbax writes it: ASCII digits, no leading zeros."""
    return re.fullmatch("0|[1-9][0-9]*", entry.name) is not None


def is_finished(step: pathlib.Path) -> bool:
    """Return whether the directory of a step is complete.

    Only the existence of the marker file counts. A step whose marker is damaged is neither hidden nor deleted.
    """
    return (step / COMPLETE).is_file()


def damaged(step: pathlib.Path, what: str | Exception) -> UserError:
    """Return a one-line error that names the damage and explains how to go back to the previous step."""
    cause = " ".join(str(what).split())[:300]
    earlier = [number for number in finished_steps(step.parent.parent) if number < int(step.name)]
    back = f"delete {step} to go back to step {earlier[-1]}, or copy" if earlier else "there is no earlier step; copy"
    return UserError(f"{step} is damaged ({cause}); {back} it again")


class StepItem:
    """The arrays of one item of a step. The constructor opens all of them; `read` reads their data.

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
        """Read `array[index]` and verify every part (stored shard or chunk) that the region touches.

        Args:
            name: name of the array.
            index: slices of step 1 or integers for the leading axes; the remaining axes are read in full.

        Returns:
            The region, in the stored dtype.

        Raises:
            UserError: the data cannot be read or differs from its checksum; the message names the array and, if it
                can be determined, the file.
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
        """Return ", in FILE, ..." with the files that hold an array, or "" if the index cannot be read."""
        try:
            base = tensorstore.KvStore.open(_base(self._files)).result()
            root = tensorstore.ocdbt.dump(base).result()["versions"][-1]["root"]["location"]
            files = {file for key, file in _entries(base, root) if key.rpartition("/")[0] == name}
        except (OSError, ValueError, KeyError, IndexError):
            return ""
        return f", in {', '.join(sorted(files))}" if files else ""


def read_sums(step: pathlib.Path) -> checksums.StepSums:
    """Read the checksums of a step. Raises UserError if they are missing or incomplete."""
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
    """Open the arrays of one item without reading their data.

    Args:
        item: directory of the item.
        bounded: refuse arrays that are far larger than their files. A chunk without a file reads as zeros, so a small
            damaged or hostile checkpoint could declare arrays of any size.

    Returns:
        {name: tensorstore of the array}.

    Raises:
        OSError, ValueError: the item is missing, damaged or too large.
    """
    metadata = untrusted_json.parse(untrusted_json.read_bytes(item / "_METADATA"))
    stored = _stored_bytes(item)
    (item / _MANIFEST).stat()  # raises if it is missing, which tensorstore would read as an empty database
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
    """Return the total size in bytes of all files below a directory.

    Raises:
        OSError: a file is a named pipe or a device, on which tensorstore would block, or a manifest is too large.
    """
    total = 0
    for directory, _, files in os.walk(folder):
        for name in files:
            status = os.stat(os.path.join(directory, name))
            # tensorstore reads the manifest in one piece, and aborts the process if it does not fit in memory.
            too_large = name == _MANIFEST and status.st_size > untrusted_json.LARGE
            if not stat.S_ISREG(status.st_mode) or too_large:
                raise OSError(errno.EINVAL, "no regular file of a possible size", os.path.join(directory, name))
            total += status.st_size
    return total


def _entries(base: tensorstore.KvStore, location: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, file) for every value below a node of an OCDBT index. The node's own file holds inline values."""
    node = tensorstore.ocdbt.dump(base, location).result()
    for entry in node["entries"]:
        if node["height"]:
            yield from _entries(base, entry["location"], prefix + entry["subtree_common_prefix"].decode())
        else:
            # The format is value:<file>:<offset>:<length>, and <file> contains a ":" that is not in the file name.
            place = entry.get("indirect_value", location)
            yield prefix + entry["key"].decode(), place.split(":", 1)[1].rsplit(":", 2)[0].replace(":", "")
