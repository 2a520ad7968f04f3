"""Block hashes: a hash chain over token ids, so that equal hashes mean equal cache contents.

The chain starts at a seed, which covers everything that the contents of every block depend on besides the tokens: the
weights themselves (training changes them under one name), config, precision, cache format and a tenant's salt. What
only some tokens depend on, such as the image behind placeholder tokens, is an extra key of the blocks of these tokens.
A difference in any of them gives a cache miss, never a false hit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

SIZE = 16  # bytes per hash
_PIECE = 16 << 20  # bytes that one thread hashes at a time; changing it changes `tree_digest`


class ExtraKey(NamedTuple):
    """Content that the token ids of a request do not tell; vLLM's `generate_block_hash_extra_keys` has the same parts.

    Attributes:
      identifier: hash or name of the content, such as the content hash of an image, or an adapter's id.
      offset: position of the first token that depends on the content, such as the first placeholder token of an image.
      length: number of these tokens; None for all tokens from `offset` on, generated ones too (an adapter).
    """

    identifier: str
    offset: int = 0
    length: int | None = None


def hash_seed(weights_digest: bytes, *parts: object, salt: str = "") -> bytes:
    """Return the hash seed, the parent of a sequence's first block, 16 bytes.

    Args:
      weights_digest: digest of the weights.
      *parts: bytes, or values whose `repr` is complete (strings, numbers, frozen dataclasses of these).
      salt: blocks are shared only between requests with the same salt.
    """
    whole = hashlib.blake2b(digest_size=SIZE)
    for part in (weights_digest, salt, *parts):
        data = part if isinstance(part, bytes) else repr(part).encode()
        whole.update(b"%c%d:" % (isinstance(part, bytes), len(data)) + data)
    return whole.digest()


def block_hashes(
    parent: bytes,
    token_ids: Sequence[int] | np.ndarray,
    block: int,
    *,
    extra_keys: Sequence[ExtraKey] = (),
    start: int = 0,
) -> list[bytes]:
    """Return the hashes of the full blocks that follow `parent`. Tokens after the last full block are ignored.

    A hash is blake2b over the preceding hash, the block's token ids as little-endian int32 and the extra keys of the
    block. Without extra keys it is blake2b over the former two alone.

    Args:
      parent: the seed or the hash of the preceding block.
      token_ids: token ids, which must fit in int32.
      block: tokens per block.
      extra_keys: extra keys of the request. A key belongs to every block that has one of its tokens, and to the
        position of its first token in that block.
      start: position of token_ids[0] in the request, to which the offsets of the extra keys are relative.
    """
    count = len(token_ids) // block
    extra_keys = sorted(extra_keys, key=lambda key: (key.offset, key.identifier))
    data = memoryview(np.asarray(token_ids[: count * block], "<i4").tobytes())
    names, size = [], 4 * block
    for begin in range(0, len(data), size):
        first = start + begin // 4
        extra = _encode_extra_keys(extra_keys, first, first + block)
        parent = hashlib.blake2b(parent + data[begin : begin + size] + extra, digest_size=SIZE).digest()
        names.append(parent)
    return names


def _encode_extra_keys(extra_keys: Sequence[ExtraKey], start: int, end: int) -> bytes:
    """Return the sorted extra keys of the tokens from `start` to `end` as bytes, b"" if there are none.

    The offset of a key is relative to `start`. It is negative if the block holds a later part of the content.
    """
    found = b""
    for identifier, offset, length in extra_keys:
        if offset < end and (length is None or start < offset + length):
            data = identifier.encode()
            found += (offset - start).to_bytes(8, "little", signed=True) + len(data).to_bytes(4, "little") + data
    return found


def tree_digest(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return a digest of the names, dtypes, shapes and contents of arrays, 16 bytes, independent of their order.

    Values are converted by `np.asarray`, one at a time. Large arrays are hashed in pieces by a pool of threads, because
    hashing releases the interpreter lock.
    """
    whole = hashlib.blake2b(digest_size=SIZE)
    with ThreadPoolExecutor() as pool:
        for name in sorted(arrays):
            array = np.asarray(arrays[name])
            whole.update(repr((name, array.dtype.name, array.shape)).encode())
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            pieces = (data[start : start + _PIECE] for start in range(0, data.size, _PIECE))
            for piece in pool.map(_hash, pieces):
                whole.update(piece)
    return whole.digest()


def row_digests(array: np.ndarray) -> np.ndarray:
    """Return a digest of each row of an array, uint8 [rows, 16].

    It is an input of `tree_digest` for arrays of which no process holds all rows.
    """
    rows = np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
    with ThreadPoolExecutor() as pool:
        return np.array([list(name) for name in pool.map(_hash, rows)], np.uint8).reshape(len(array), SIZE)


def _hash(data: np.ndarray) -> bytes:
    return hashlib.blake2b(data, digest_size=SIZE).digest()
