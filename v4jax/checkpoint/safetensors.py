"""Safetensors directories: reads any slice by byte range and writes tensor by tensor.

A file consists of the header length (8 bytes, little endian), a JSON header {name: {dtype, shape, data_offsets}} and
the raw row-major data. `write_safetensors` stores an xxh3-64 checksum of every tensor in the `__metadata__` of the
header. The checksums therefore travel with the file, and disappear when another program rewrites it. Readers compare
tensors with them.

This module does not use the safetensors library, because the library cannot return FP8 and FP4 tensors as numpy
arrays. Errors of this module (UserError) name the file and the cure in one line.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from v4jax.core import dtypes, untrusted_json
from v4jax.core.atomic import require_space, write_all, write_text
from v4jax.core.errors import UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_DIGESTS = "xxh3_64"  # key of the tensor checksums in `__metadata__`: JSON of {tensor: 16 hexadecimal digits}
_FILES = "xxh3_64_files"  # key of the checksums of the other files of the directory: JSON of {file: 16 digits}
_BLOCK_BYTES = 1 << 20  # bytes that are read and hashed at a time
# Bytes; enough for 130,000 tensors. A published file has up to 3,000 tensors, the flagship's checkpoint 140,000 in all.
_MAX_HEADER = 24 << 20
_MAX_AXES = 8
_MAX_SIZE = 1 << 48  # elements along one axis
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """Location and type of one tensor.

    Attributes:
        file: file that holds the tensor.
        code: safetensors dtype code, such as "BF16".
        shape: shape in elements.
        start: offset of the first byte in the file.
        stop: offset behind the last byte in the file.
        digest: xxh3-64 of the bytes, 16 hexadecimal digits; None if the file has no checksums.
    """

    file: pathlib.Path
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int
    digest: str | None = None


class SafetensorsDir:
    """The tensors of a directory or of one .safetensors file, read on demand.

    The files of a directory are those that model.safetensors.index.json names, else model.safetensors, else every
    *.safetensors. The constructor reads and checks all headers, and reads no tensor data.

    Args:
        path: directory or file.
        verify: compare every tensor that is read with its checksum, if the file has one.

    Raises:
        UserError: a file is missing, damaged or inconsistent with the others.
    """

    def __init__(self, path: str | os.PathLike, verify: bool = True):
        self.path = pathlib.Path(path)
        self._verify = verify
        self._tensors = _open_file(self.path) if self.path.is_file() else _open_directory(self.path)

    def names(self) -> list[str]:
        """Return the names of all tensors, in the order of the index or the headers."""
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def file_digests(self) -> dict[str, str]:
        """Return {file name: xxh3-64} of the files written beside the weights; empty if no checksums were stored."""
        files = sorted({info.file for info in self._tensors.values()})
        return _digests(files[0], _header_of(files[0])[0].get("__metadata__", {}), _FILES) if files else {}

    def info(self, name: str) -> TensorInfo:
        """Return the location and type of a tensor. Raises UserError if there is no such tensor."""
        if name not in self._tensors:
            raise UserError(f"{self.path} has no tensor {name!r}; the checkpoint is incomplete or of another model")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in elements, for F4 too (not in packed bytes)."""
        return self.info(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Return the numpy or ml_dtypes dtype of a tensor."""
        return dtypes.numpy_dtype(self.info(name).code)

    def read(self, name: str, index: int | slice | tuple = ()) -> np.ndarray:
        """Read a tensor, or `tensor[index]`.

        Only the bytes of the indexed region are read, except that F4 tensors and verified tensors are read in full and
        then indexed.

        Args:
            name: name of the tensor.
            index: ints and slices of step 1 for the leading axes.

        Returns:
            A new, writable array.

        Raises:
            UserError: the tensor does not exist, cannot be read, or differs from its checksum.
        """
        info = self.info(name)
        index = index if isinstance(index, tuple) else (index,)
        ranges, kept = _normalize(name, info.shape, index)
        dtype = dtypes.numpy_dtype(info.code)
        verify = self._verify and info.digest is not None
        with _open(info.file) as file:
            if verify or info.code == "F4":
                raw = np.empty(info.stop - info.start, np.uint8)
                if verify:
                    _read_verified(file, name, info, raw)
                else:
                    _read_into(file, info, 0, raw)
                whole = (dtypes.unpack_f4(raw) if info.code == "F4" else raw.view(dtype)).reshape(info.shape)
                return np.array(whole[index]) if index else whole
            out = np.empty([len(r) for r in ranges] + list(info.shape[len(ranges) :]), dtype)
            if out.size:
                _read_ranges(file, info, ranges, out)
        return out.reshape([out.shape[axis] for axis in kept] + list(info.shape[len(ranges) :]))


def _normalize(name: str, shape: tuple[int, ...], index: tuple) -> tuple[list[range], list[int]]:
    """Return the ranges of the indexed axes, and the axes that the result keeps (an int drops its axis)."""
    if len(index) > len(shape):
        raise IndexError(f"{name} has {len(shape)} axes, index has {len(index)}")
    ranges, kept = [], []
    for axis, (item, size) in enumerate(zip(index, shape, strict=False)):
        if isinstance(item, slice):
            ranges.append(range(*item.indices(size)))
            kept.append(axis)
            if ranges[-1].step != 1:
                raise IndexError(f"{name}: only slices of step 1 can be read")
        else:
            position = range(size)[item]
            ranges.append(range(position, position + 1))
    return ranges, kept


def _read_ranges(file, info: TensorInfo, ranges: list[range], out: np.ndarray) -> None:
    """Fill `out` with one read per contiguous run of bytes: the last partial axis and all axes after it."""
    while ranges and len(ranges[-1]) == info.shape[len(ranges) - 1]:
        ranges = ranges[:-1]
    item = out.dtype.itemsize
    strides = [math.prod(info.shape[axis + 1 :]) * item for axis in range(len(info.shape))]
    if not ranges:
        return _read_into(file, info, 0, out.reshape(-1).view(np.uint8))
    runs = out.reshape(math.prod(len(r) for r in ranges[:-1]), -1).view(np.uint8)
    for run, outer in zip(runs, np.ndindex(*(len(r) for r in ranges[:-1])), strict=True):
        position = [r[i] for r, i in zip(ranges[:-1], outer, strict=True)] + [ranges[-1].start]
        _read_into(file, info, sum(p * s for p, s in zip(position, strides, strict=False)), run)
    return None


def _read_verified(file, name: str, info: TensorInfo, out: np.ndarray) -> None:
    """Read a full tensor and compare it with its checksum, hashing each block while it is in the CPU cache."""
    state = xxhash.xxh3_64()
    for offset in range(0, out.size, _BLOCK_BYTES):
        block = out[offset : offset + _BLOCK_BYTES]
        _read_into(file, info, offset, block)
        state.update(block)
    if state.hexdigest() != info.digest:
        raise _damaged(info.file, f"holds {name!r}, which differs from its checksum")


def _read_into(file, info: TensorInfo, offset: int, out: np.ndarray) -> None:
    file.seek(info.start + offset)
    view = memoryview(out)
    while view:
        count = file.readinto(view)
        if not count:
            raise _damaged(info.file, "ends inside a tensor")
        view = view[count:]


# --- opening and checking ----------------------------------------------------------------------------------------


def _open_directory(path: pathlib.Path) -> dict[str, TensorInfo]:
    if not path.is_dir():
        raise UserError(f"no such checkpoint: {path}; give a directory with .safetensors files")
    if (path / INDEX_NAME).is_file():
        return _open_indexed(path)
    if (path / SINGLE_NAME).is_file():
        return _open_file(path / SINGLE_NAME)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{path} has no .safetensors file; v4jax reads safetensors only, so convert other formats first"
        )
    _check_shard_set(path, [file.name for file in files])
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _open_file(file).items():
            if name in tensors:
                raise UserError(
                    f"tensor {name!r} is both in {tensors[name].file} and in {file.name}; remove one of them"
                )
            tensors[name] = info
    return tensors


def _check_shard_set(path: pathlib.Path, names: list[str]) -> None:
    """Raise UserError if a shard is missing. Without an index, only the file names tell the number of shards."""
    present = set(names)
    for stem, count in {match.group(1, 3) for match in filter(None, map(_SHARD.fullmatch, names))}:
        for number in range(1, int(count) + 1):
            wanted = f"{stem}-{number:05d}-of-{count}.safetensors"
            if wanted not in present:
                raise UserError(f"{path} lacks the shard {wanted}; download or copy it")


def _open_indexed(path: pathlib.Path) -> dict[str, TensorInfo]:
    index = untrusted_json.read_object(path / INDEX_NAME, untrusted_json.LARGE)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{path / INDEX_NAME} has no weight_map of names to files; download it again")
    files: dict[str, dict[str, TensorInfo]] = {}
    for file in sorted(set(weight_map.values())):
        if file != os.path.basename(file) or not os.path.isfile(path / file):
            raise UserError(f"{path / INDEX_NAME} names the shard {file}, which is missing; download or copy it")
        files[file] = _open_file(path / file)
    tensors = {}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise UserError(
                f"{path / INDEX_NAME} places {name!r} in {file}, which does not hold it; download both again"
            )
        tensors[name] = files[file][name]
    return tensors


def _open_file(path: pathlib.Path) -> dict[str, TensorInfo]:
    """Read the header of one file, and check that the byte ranges lie inside the file and do not overlap."""
    header, length, size = _header_of(path)
    digests = _digests(path, header.get("__metadata__", {}), _DIGESTS)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    with untrusted_json.collection_paused():
        tensors = {name: _parse_entry(path, name, e, 8 + length, digests.get(name)) for name, e in entries.items()}
    end, previous = 8 + length, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start < end and info.stop > info.start:
            raise _damaged(path, f"gives {name!r} and {previous!r} overlapping bytes")
        if info.stop > size:
            raise _damaged(path, f"is truncated: {name!r} ends at byte {info.stop} of {size}")
        if info.stop > info.start:
            end, previous = info.stop, name
    return tensors


def _header_of(path: pathlib.Path) -> tuple[dict, int, int]:
    """Return the parsed header of a file, the length of the header in bytes, and the size of the file in bytes."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MAX_HEADER or 8 + length > size:
            raise _damaged(path, f"has no complete header ({size} bytes in all)")
        raw = file.read(length)
    try:
        header = untrusted_json.parse(raw, _MAX_HEADER)
    except untrusted_json.JsonError as error:
        raise _damaged(path, f"has an unreadable header ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "has a header that is no JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "has a header whose __metadata__ is no object of strings")
    return header, length, size


def _digests(path: pathlib.Path, metadata: dict[str, str], key: str) -> dict[str, str]:
    """Return the checksums by name that the metadata of a header holds under `key`, or {} if it has none."""
    if key not in metadata:
        return {}
    try:
        digests = untrusted_json.parse(metadata[key], _MAX_HEADER)
    except ValueError as error:
        raise _damaged(path, f"has unreadable checksums ({error})") from error
    if not isinstance(digests, dict):
        raise _damaged(path, "has checksums that are no JSON object")
    return digests


def _parse_entry(path: pathlib.Path, name: str, entry, base: int, digest: str | None) -> TensorInfo:
    try:
        code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers_ok = len(shape) <= _MAX_AXES and all(type(n) is int and 0 <= n <= _MAX_SIZE for n in shape)
        numbers_ok = numbers_ok and type(start) is int and type(stop) is int and start >= 0 and stop >= 0
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"has a bad header entry for {name!r}") from error
    if not numbers_ok:
        raise _damaged(path, f"has a bad shape or offset for {name!r}")
    if not isinstance(code, str) or code not in dtypes.CODES:
        raise UserError(f"{path}: {name!r} has the type {code!r}; v4jax reads {', '.join(dtypes.CODES)}")
    if stop - start != dtypes.nbytes(code, shape):
        raise _damaged(
            path, f"gives {name!r} {stop - start} bytes, but {code}{list(shape)} takes {dtypes.nbytes(code, shape)}"
        )
    return TensorInfo(path, code, shape, base + start, base + stop, digest)


def _damaged(path: pathlib.Path, what: str) -> UserError:
    return UserError(f"{path} {what}; the file is damaged, download or copy it again")


def _open(path: pathlib.Path):
    try:
        # Without O_NONBLOCK, opening a named pipe would block until a writer opens it.
        file = open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check that it exists and is readable") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _damaged(path, "is no regular file")
    return file


# --- writing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One tensor to write. Shape and dtype are known in advance; `load` is called once, when the data is written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return dtypes.nbytes(dtypes.code_of(self.dtype), self.shape)


def write_safetensors(
    directory: str | os.PathLike,
    entries: Sequence[Entry],
    max_shard_bytes: int = 5 * 10**9,
    files: dict[str, str] | None = None,
) -> None:
    """Write tensors one at a time as model.safetensors, or as numbered shards with an index if one file is too small.

    All tensors are read back and compared with their checksums. A failure leaves partial files, so wrap the call in
    `replace_directory`.

    Args:
        directory: existing directory to write to.
        entries: the tensors; each file holds consecutive ones.
        max_shard_bytes: largest number of tensor bytes in a file; a larger tensor gets a file of its own.
        files: {file name: checksum} of the other files of the directory, stored in the headers.

    Raises:
        UserError: a tensor that was read back differs from its checksum.
        OSError: the disk is full or not writable.
    """
    directory = pathlib.Path(directory)
    total = sum(entry.nbytes for entry in entries)
    require_space(directory, total)
    shards = _plan(entries, max_shard_bytes)
    if len(shards) == 1:
        _write_file(directory / SINGLE_NAME, shards[0], files)
    else:
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write_file(directory / name, shard, files)
            weight_map |= {entry.name: name for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    written = SafetensorsDir(directory)
    for name in written.names():
        written.read(name)


def _plan(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Split entries into consecutive shards. Each shard sorts the widest dtypes first, so all tensors are aligned."""
    shards, room = [[]], limit
    for entry in entries:
        if entry.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(entry)
        room -= entry.nbytes
    return [sorted(shard, key=lambda entry: -dtypes.bytes_per_element(dtypes.code_of(entry.dtype))) for shard in shards]


def _write_file(path: pathlib.Path, entries: list[Entry], files: dict[str, str] | None = None) -> None:
    digests = {entry.name: "0" * 16 for entry in entries}  # placeholders; the header is rewritten after the data
    with open(path, "wb", buffering=0) as file:
        write_all(file, _header(entries, digests, files))
        for entry in entries:
            array = entry.load()
            if array.shape != tuple(entry.shape) or array.dtype != entry.dtype:
                raise ValueError(f"{entry.name}: got {array.dtype}{array.shape}, planned {entry.dtype}{entry.shape}")
            if dtypes.code_of(entry.dtype) == "F4":
                array = dtypes.pack_f4(array.reshape(-1))
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            digests[entry.name] = xxhash.xxh3_64_hexdigest(data)
            write_all(file, data)
        file.seek(0)
        write_all(file, _header(entries, digests, files))
        os.fsync(file.fileno())


def _header(entries: list[Entry], digests: dict[str, str], files: dict[str, str] | None) -> bytes:
    """Return the header of a file, preceded by its length. Its size does not depend on the values of the digests."""
    metadata = {"format": "pt", _DIGESTS: json.dumps(digests, separators=(",", ":"))}  # transformers requires "pt"
    if files:
        metadata[_FILES] = json.dumps(files, separators=(",", ":"))
    header: dict[str, dict] = {"__metadata__": metadata}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": dtypes.code_of(entry.dtype),
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
