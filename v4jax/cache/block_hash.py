"""Names of blocks: a hash chain over token ids, so that equal names mean equal cache contents.

The first link is a seed that holds everything besides the tokens that the contents depend on: the weights themselves
(training changes them under one name), config, precision, layout and a tenant's salt. Whatever differs is a miss,
never a collision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SIZE = 16  # bytes of a name
_PIECE = 16 << 20  # bytes hashed by one thread at a time; part of what `digest` means


def hash_seed(weights_digest: bytes, *parts: object, salt: str = "") -> bytes:
    """The parent of a first block: 16 bytes.

    parts: bytes, or values whose `repr` says all of them (strings, numbers, frozen dataclasses of such). salt: pages
    are found only by requests with the same one.
    """
    whole = hashlib.blake2b(digest_size=SIZE)
    for part in (weights_digest, salt, *parts):
        data = part if isinstance(part, bytes) else repr(part).encode()
        whole.update(b"%c%d:" % (isinstance(part, bytes), len(data)) + data)
    return whole.digest()


def block_hashes(parent: bytes, token_ids: Sequence[int] | np.ndarray, block: int) -> list[bytes]:
    """Names of the full blocks of `block` tokens that follow `parent` (a seed or a block's name); the rest is left.

    Every name is blake2b over the one before and the block's ids as little-endian int32, which they must fit.
    """
    count = len(token_ids) // block
    data = memoryview(np.asarray(token_ids[: count * block], "<i4").tobytes())
    names, size = [], 4 * block
    for start in range(0, len(data), size):
        parent = hashlib.blake2b(parent + data[start : start + size], digest_size=SIZE).digest()
        names.append(parent)
    return names


def tree_digest(arrays: Mapping[str, np.ndarray]) -> bytes:
    """16 bytes over the names, dtypes, shapes and contents of arrays, in any order of names.

    Takes whatever `np.asarray` takes, one array at a time. Large arrays are hashed in pieces, by as many threads as
    there are cores (hashing holds no interpreter lock).
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
    """16 bytes over the contents of each row of an array: uint8 [rows, 16]; for `digest` where no one has all rows."""
    rows = np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
    with ThreadPoolExecutor() as pool:
        return np.array([list(name) for name in pool.map(_hash, rows)], np.uint8).reshape(len(array), SIZE)


def _hash(data: np.ndarray) -> bytes:
    return hashlib.blake2b(data, digest_size=SIZE).digest()
