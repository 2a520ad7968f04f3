"""A stored block or record as bytes: what lies in a file of the disk tier, and how it is recognized and verified.

Little-endian: magic (8 bytes), version and kind (2 each), length of the group table (4), name, parent and form (16
each), length of the payload and its xxh3-64 (8 each), xxh3-64 of all that and the table (8); then the table, JSON
padded with spaces so that the payload begins at a multiple of 64; then the payload. Nothing else is in the file.

A *name* says what the contents are (`prefix.chain`: weights, config, precision, tokens, tenant), a *form* how they are
laid out (the group table: every array with dtype and logical shape, whatever the mesh; where a process of several
stores its part, also which part of each). Both are the key. What has another key is another thing, so a change of
either is a miss and never a collision.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import ml_dtypes  # noqa: F401 - teaches numpy the names of its dtypes
import numpy as np
import xxhash

from v4jax.core import untrusted_json

VERSION = 1
KINDS = ("block", "record")
_MAGIC = b"V4JAX-KV"
_HEADER = struct.Struct("<8sHHI16s16s16sQQ")
_SUM = struct.Struct("<Q")
_ALIGN = 64
_DTYPE = re.compile(r"[a-z]\w{1,30}")  # the name of a type, nothing that numpy would parse further
_MAX_AXES, _MAX_SIZE = 8, 1 << 32  # of a stored array
_FILE = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})-([0-9a-f]{32})\.(block|record)")


class CorruptBlockError(Exception):
    """Stored bytes are not what their key promises; the message says in which way."""


class BlockKey(NamedTuple):
    """kind: "block" or "record"; name and form: 16 bytes each."""

    kind: str
    block_hash: bytes
    schema: bytes

    def file(self, parent: bytes) -> str:
        """Name of its file, which tells everything that an index needs."""
        return f"{self.block_hash.hex()}-{parent.hex()}-{self.schema.hex()}.{self.kind}"


def parse_filename(file: str) -> tuple[BlockKey, bytes] | None:
    """(key, parent) of a file's name, None for a file that is none of ours."""
    match = _FILE.fullmatch(file)
    if match is None:
        return None
    name, parent, form = (bytes.fromhex(part) for part in match.groups()[:3])
    return BlockKey(match[4], name, form), parent


Box = tuple[tuple[int, int], ...]  # start and end of a part of an array, axis by axis


@dataclass(frozen=True)
class BlockSchema:
    """What a payload is made of: (name, dtype, shape) of every array, in the order in which their bytes follow.

    boxes: the part of each that is there, where not all is; then an array may come several times (`cache.parts`).
    """

    kind: str
    table: tuple[tuple[str, str, tuple[int, ...]], ...]
    boxes: tuple[Box, ...] = ()

    @property
    def whole(self) -> BlockSchema:
        """The form of all of these arrays."""
        return BlockSchema(self.kind, tuple(dict.fromkeys(self.table))) if self.boxes else self

    @cached_property
    def pieces(self) -> tuple[tuple[str, np.dtype, Box], ...]:
        """(name, dtype, box) of everything that is there, in the order of the bytes."""
        boxes = self.boxes or [tuple((0, size) for size in shape) for _, _, shape in self.table]
        return tuple((name, np.dtype(dtype), box) for (name, dtype, _), box in zip(self.table, boxes, strict=True))

    @cached_property
    def packed(self) -> bytes:
        """The group table of the header."""
        rows = [[*row, *box] for row, *box in zip(self.table, *[self.boxes] * bool(self.boxes), strict=True)]
        data = json.dumps(rows, separators=(",", ":")).encode()
        return data + b" " * (-(_HEADER.size + _SUM.size + len(data)) % _ALIGN)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that another kind, table or version of this format does not have."""
        return hashlib.blake2b(repr((VERSION, self.kind)).encode() + self.packed, digest_size=16).digest()

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return sum(math.prod(end - start for start, end in box) * dtype.itemsize for _, dtype, box in self.pieces)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return _HEADER.size + _SUM.size + len(self.packed) + self.nbytes

    def key(self, name: bytes) -> BlockKey:
        """Key of the contents `name` in this form."""
        return BlockKey(self.kind, name, self.digest)


def checksum(data: np.ndarray | bytes | memoryview) -> int:
    """xxh3-64 of bytes."""
    return xxhash.xxh3_64_intdigest(data)


def encode_header(form: BlockSchema, name: bytes, parent: bytes, payload_sum: int) -> bytes:
    """All of a file that precedes the payload."""
    fields = (_MAGIC, VERSION, KINDS.index(form.kind), len(form.packed), name, parent, form.digest)
    start = _HEADER.pack(*fields, form.nbytes, payload_sum)
    return start + _SUM.pack(checksum(start + form.packed)) + form.packed


def decode_schema(data: np.ndarray) -> BlockSchema:
    """The form of a file that begins with these bytes (uint8 [bytes]), of any length. Raises Corrupt."""
    first = _HEADER.size + _SUM.size
    if data.size < first:
        raise CorruptBlockError(f"{data.size} bytes are no header")
    magic, version, kind, length, _, _, digest, *_ = _HEADER.unpack(data[: _HEADER.size])
    if (magic, version) != (_MAGIC, VERSION) or kind >= len(KINDS):
        raise CorruptBlockError("no record of this format and version")
    try:
        rows = untrusted_json.parse(data[first : first + length].tobytes())
        table = tuple((name, dtype, tuple(shape)) for name, dtype, shape, *_ in rows)
        boxes = tuple(tuple((start, end) for start, end in box) for *_, box in rows) if len(rows[0]) > 3 else ()
        form = BlockSchema(KINDS[kind], table, boxes)
        _check_table(form)
        right = form.digest == digest
    except (ValueError, TypeError, IndexError, KeyError) as error:
        raise CorruptBlockError("the group table cannot be read") from error
    if not right:
        raise CorruptBlockError("the group table is not that of its digest")
    return form


def _check_table(form: BlockSchema) -> None:
    """Raise ValueError or TypeError for a table that describes no arrays: their digest does not say who wrote it."""
    boxes = form.boxes or [tuple((0, size) for size in shape) for _, _, shape in form.table]
    for (name, dtype, shape), box in zip(form.table, boxes, strict=True):
        if type(name) is not str or not _DTYPE.fullmatch(dtype) or np.dtype(dtype).hasobject or len(shape) > _MAX_AXES:
            raise ValueError("no array has this name, type and shape")
        for size, (start, end) in zip(shape, box, strict=True):
            if not type(size) is type(start) is type(end) is int or not 0 <= start <= end <= size <= _MAX_SIZE:
                raise ValueError("a part lies outside its array")


def decode_payload(data: np.ndarray, form: BlockSchema, name: bytes, parent: bytes) -> tuple[np.ndarray, int]:
    """(payload, its checksum) of a whole file (uint8 [bytes]), every byte of it verified. Raises Corrupt."""
    if data.size != form.file_bytes:
        raise CorruptBlockError(f"{data.size} bytes where {form.file_bytes} belong")
    split = form.file_bytes - form.nbytes
    start, table = data[: _HEADER.size], data[_HEADER.size + _SUM.size : split]
    magic, version, kind, length, *ids, payload_bytes, payload_sum = _HEADER.unpack(start)
    if (magic, version) != (_MAGIC, VERSION):
        raise CorruptBlockError("no record of this format and version")
    [header_sum] = _SUM.unpack(data[_HEADER.size : _HEADER.size + _SUM.size])
    if checksum(np.concatenate([start, table])) != header_sum:
        raise CorruptBlockError("the header fails its checksum")
    if (kind, length, *ids) != (KINDS.index(form.kind), len(form.packed), name, parent, form.digest):
        raise CorruptBlockError("the header names another key")
    if payload_bytes != form.nbytes or table.tobytes() != form.packed:
        raise CorruptBlockError("the header describes another group table")
    payload = data[split:]
    if checksum(payload) != payload_sum:
        raise CorruptBlockError("the payload fails its checksum")
    return payload, payload_sum
