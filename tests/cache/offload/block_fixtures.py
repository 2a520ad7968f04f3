"""Small blocks and records to store; imports no jax, so that children start at once."""

import hashlib

import numpy as np

from v4jax.cache.offload.block_file import BlockSchema, checksum
from v4jax.cache.offload.host_tier import StoredBlock

ROOT = bytes(16)
BLOCK = BlockSchema(
    "block", (("csa.main", "uint16", (4, 16)), ("csa.index", "float8_e4m3fn", (4, 8)), ("hca.main", "float32", (2, 16)))
)
RECORD = BlockSchema("record", (("ring", "float32", (8, 16)), ("tails", "float32", (8, 32))))


def name(*parts) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def chain(seed, count) -> list[bytes]:
    """Names of the blocks of one sequence; the parent of the first is ROOT."""
    return [name(seed, i) for i in range(count)]


def payload(form, name) -> np.ndarray:
    """What belongs under a name: anything else is wrong."""
    seed = int.from_bytes(hashlib.blake2b(form.digest + name, digest_size=8).digest(), "little")
    return np.random.default_rng(seed).integers(0, 256, form.nbytes, np.uint8)


def item(form, name, parent=ROOT) -> StoredBlock:
    data = payload(form, name)
    return StoredBlock(form, name, parent, data, checksum(data))


def items(names, *boundaries):
    """The blocks of a chain, and records behind the first `boundaries` of them."""
    parents = [ROOT, *names]
    blocks = [item(BLOCK, *pair) for pair in zip(names, parents, strict=False)]
    return blocks + [item(RECORD, names[count - 1], parents[count - 1]) for count in boundaries]


def is_right(item) -> bool:
    return np.array_equal(np.asarray(item.payload), payload(item.schema, item.block_hash))
