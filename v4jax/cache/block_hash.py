"""Block hashes: a hash chain over token ids, so that equal hashes mean equal cache contents.

The chain starts at a seed, which covers everything besides the tokens that the contents depend on: the weights
themselves (training changes them under one name), config, precision, cache format and a tenant's salt. A difference in
any of them gives a cache miss, never a false hit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SIZE = 16  # bytes per hash
_PIECE = 16 << 20  # bytes that one thread hashes at a time; changing it changes `tree_digest`


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


def block_hashes(parent: bytes, token_ids: Sequence[int] | np.ndarray, block: int) -> list[bytes]:
    """Return the hashes of the full blocks that follow `parent`. Tokens after the last full block are ignored.

    A hash is blake2b over the preceding hash and the block's token ids as little-endian int32.

    Args:
      parent: the seed or the hash of the preceding block.
      token_ids: token ids, which must fit in int32.
      block: tokens per block.
    """
    count = len(token_ids) // block
    data = memoryview(np.asarray(token_ids[: count * block], "<i4").tobytes())
    names, size = [], 4 * block
    for start in range(0, len(data), size):
        parent = hashlib.blake2b(parent + data[start : start + size], digest_size=SIZE).digest()
        names.append(parent)
    return names


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
