"""File format of one stored block or state snapshot in the disk tier, and its verification.

The fields are little-endian: magic (8 bytes), version and kind (2 each), length of the array table (4), block hash,
parent's hash and schema digest (16 each), length of the payload and its xxh3-64 (8 each), xxh3-64 of all fields so far
and the table (8). The table follows as JSON, padded with spaces so that the payload starts at a multiple of 64 bytes.
The payload follows. The file contains nothing else.

A block hash identifies the contents (`block_hash.block_hashes`: weights, config, tokens, salt), a schema their layout
(the array table: name, dtype and shape of every array). Both form the key, so a change of either is a miss and never a
collision.

In identifiers and in the kind of a key, "record" is a state snapshot.
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

import ml_dtypes  # noqa: F401 - registers bfloat16 and the float8 dtypes with numpy
import numpy as np
import xxhash

VERSION = 1
KINDS = ("block", "record")
_MAGIC = b"V4JAX-KV"
_HEADER = struct.Struct("<8sHHI16s16s16sQQ")
_SUM = struct.Struct("<Q")
_ALIGN = 64
_FILE = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})-([0-9a-f]{32})\.(block|record)")


class CorruptBlockError(Exception):
    """Stored bytes do not match their key or checksum. The message names the mismatch."""


class BlockKey(NamedTuple):
    """Key of a stored item in every tier.

    Attributes:
      kind: "block" for a KV block, "record" for a state snapshot.
      block_hash: 16 bytes; hash of the block, or of the block that the state snapshot ends.
      schema: 16 bytes; `BlockSchema.digest` of the payload's layout.
    """

    kind: str
    block_hash: bytes
    schema: bytes

    def file(self, parent: bytes) -> str:
        """Name of the item's file. It contains the key and the parent's hash, which is all that an index needs."""
        return f"{self.block_hash.hex()}-{parent.hex()}-{self.schema.hex()}.{self.kind}"


def parse_filename(file: str) -> tuple[BlockKey, bytes] | None:
    """(key, parent's hash) from a file name; None if the disk tier does not write such a name."""
    match = _FILE.fullmatch(file)
    if match is None:
        return None
    block_hash, parent, schema = (bytes.fromhex(part) for part in match.groups()[:3])
    return BlockKey(match[4], block_hash, schema), parent


@dataclass(frozen=True)
class BlockSchema:
    """Layout of a payload.

    Attributes:
      kind: "block" or "record".
      table: (name, dtype, shape) of every array, in the order of their bytes in the payload.
    """

    kind: str
    table: tuple[tuple[str, str, tuple[int, ...]], ...]

    @cached_property
    def packed(self) -> bytes:
        """The array table of the header: JSON, padded so that the payload is aligned."""
        data = json.dumps(self.table, separators=(",", ":")).encode()
        return data + b" " * (-(_HEADER.size + _SUM.size + len(data)) % _ALIGN)

    @cached_property
    def digest(self) -> bytes:
        """16-byte BLAKE2b hash of the format version, the kind and the table."""
        return hashlib.blake2b(repr((VERSION, self.kind)).encode() + self.packed, digest_size=16).digest()

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for _, dtype, shape in self.table)

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return _HEADER.size + _SUM.size + len(self.packed) + self.nbytes

    def key(self, block_hash: bytes) -> BlockKey:
        """Key of the contents `block_hash` in this schema."""
        return BlockKey(self.kind, block_hash, self.digest)


def checksum(data: np.ndarray | bytes | memoryview) -> int:
    """The xxh3-64 hash of bytes, as an unsigned 64-bit integer."""
    return xxhash.xxh3_64_intdigest(data)


def encode_header(schema: BlockSchema, block_hash: bytes, parent: bytes, payload_sum: int) -> bytes:
    """The bytes of a file that precede the payload: fields, their checksum and the array table.

    Args:
      schema: Layout of the payload.
      block_hash: 16 bytes.
      parent: Hash of the preceding block, 16 bytes.
      payload_sum: `checksum` of the payload.
    """
    fields = (_MAGIC, VERSION, KINDS.index(schema.kind), len(schema.packed), block_hash, parent, schema.digest)
    start = _HEADER.pack(*fields, schema.nbytes, payload_sum)
    return start + _SUM.pack(checksum(start + schema.packed)) + schema.packed


def decode_payload(data: np.ndarray, schema: BlockSchema, block_hash: bytes, parent: bytes) -> tuple[np.ndarray, int]:
    """Verify every byte of a file and return its payload.

    Args:
      data: uint8 [bytes], the contents of the file.
      schema: Expected layout of the payload.
      block_hash: Expected block hash, 16 bytes.
      parent: Expected hash of the preceding block, 16 bytes.

    Returns:
      (payload, checksum): a view into `data`, uint8 [schema.nbytes], and its xxh3-64.

    Raises:
      CorruptBlockError: The size, a checksum or a header field does not match.
    """
    if data.size != schema.file_bytes:
        raise CorruptBlockError(f"{data.size} bytes where {schema.file_bytes} belong")
    split = schema.file_bytes - schema.nbytes
    start, table = data[: _HEADER.size], data[_HEADER.size + _SUM.size : split]
    magic, version, kind, length, *ids, payload_bytes, payload_sum = _HEADER.unpack(start)
    if (magic, version) != (_MAGIC, VERSION):
        raise CorruptBlockError("no block file of this format and version")
    [header_sum] = _SUM.unpack(data[_HEADER.size : _HEADER.size + _SUM.size])
    if checksum(np.concatenate([start, table])) != header_sum:
        raise CorruptBlockError("the header fails its checksum")
    if (kind, length, *ids) != (KINDS.index(schema.kind), len(schema.packed), block_hash, parent, schema.digest):
        raise CorruptBlockError("the header names another key")
    if payload_bytes != schema.nbytes or table.tobytes() != schema.packed:
        raise CorruptBlockError("the header describes another array table")
    payload = data[split:]
    if checksum(payload) != payload_sum:
        raise CorruptBlockError("the payload fails its checksum")
    return payload, payload_sum
