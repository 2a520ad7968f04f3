import dataclasses
import hashlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4jax.cache import prefix


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int = 2
    dtype: str = "bfloat16"


ids = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(ids, ids, st.integers(1, 5))
def test_names_are_equal_exactly_where_the_tokens_before_are(a, b, block):
    seed = prefix.hash_seed(b"weights")
    for i, (one, other) in enumerate(
        zip(prefix.block_hashes(seed, a, block), prefix.block_hashes(seed, b, block), strict=False), start=1
    ):
        assert (one == other) == (a[: i * block] == b[: i * block])


@given(ids, st.integers(1, 5), st.integers(0, 8))
def test_a_chain_can_be_continued_from_any_of_its_links(tokens, block, cut):
    seed = prefix.hash_seed(b"weights")
    whole = prefix.block_hashes(seed, tokens, block)
    assert len(whole) == len(tokens) // block and all(len(name) == prefix.SIZE for name in whole)
    cut = min(cut, len(whole))
    rest = prefix.block_hashes([seed, *whole][cut], tokens[cut * block :], block)
    assert whole[:cut] + rest == whole


def test_the_hash_is_the_documented_one():
    name = hashlib.blake2b(b"parent" + bytes([7, 0, 0, 0, 0, 1, 0, 0]), digest_size=16).digest()
    assert prefix.block_hashes(b"parent", [7, 256, 9], 2) == [name]
    assert prefix.block_hashes(b"parent", np.array([7, 256, 9]), 2) == [name]


def test_whatever_enters_the_seed_changes_it():
    seeds = [
        prefix.hash_seed(b"weights"),
        prefix.hash_seed(b"other weights"),
        prefix.hash_seed(b"weights", Shape()),
        prefix.hash_seed(b"weights", Shape(layers=3)),
        prefix.hash_seed(b"weights", Shape(), "fp8"),
        prefix.hash_seed(b"weights", Shape(), salt="tenant"),
        prefix.hash_seed(b"weights", "ab", "c"),
        prefix.hash_seed(b"weights", "a", "bc"),
        prefix.hash_seed(b"weights", b"abc"),
        prefix.hash_seed(b"weights", "abc"),
        prefix.hash_seed(b"weights", "tenant"),
    ]
    assert len({*seeds}) == len(seeds) and {len(seed) for seed in seeds} == {prefix.SIZE}
    assert prefix.hash_seed(b"weights", Shape(), salt="tenant") == seeds[5]


def weights():
    return {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((), np.int32)}


def test_digest_is_of_contents_not_of_order_or_memory_layout():
    one = weights()
    other = dict(reversed(one.items()))
    other["b"] = np.asfortranarray(one["b"])
    assert not other["b"].flags.c_contiguous
    assert prefix.tree_digest(one) == prefix.tree_digest(other) and len(prefix.tree_digest(one)) == prefix.SIZE


@pytest.mark.parametrize("change", [
    {"b": np.arange(6, dtype=np.float32).reshape(3, 2)},
    {"b": np.arange(6, dtype=np.float32).reshape(2, 3).view(np.int32)},
    {"b": np.nextafter(np.arange(6, dtype=np.float32).reshape(2, 3), np.float32(9))},
    {"c": np.zeros(0)},
    {"a": np.ones((), ml_dtypes.bfloat16)},
])  # fmt: skip
def test_digest_sees_every_change(change):
    assert prefix.tree_digest(weights() | change) != prefix.tree_digest(weights())


def test_digest_sees_every_piece_of_a_large_array(monkeypatch):
    monkeypatch.setattr(prefix, "_PIECE", 64)
    data = np.zeros(200, np.uint8).view(ml_dtypes.float8_e4m3fn)
    digests = {prefix.tree_digest({"a": data})}
    for i in (0, 63, 64, 199):
        changed = data.view(np.uint8).copy()
        changed[i] = 1
        digests.add(prefix.tree_digest({"a": changed.view(ml_dtypes.float8_e4m3fn)}))
    assert len(digests) == 5
