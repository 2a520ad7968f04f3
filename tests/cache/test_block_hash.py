import dataclasses
import hashlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4jax.cache import block_hash


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int = 2
    dtype: str = "bfloat16"


ids = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(ids, ids, st.integers(1, 5))
def test_names_are_equal_exactly_where_the_tokens_before_are(a, b, block):
    seed = block_hash.hash_seed(b"weights")
    for i, (one, other) in enumerate(
        zip(block_hash.block_hashes(seed, a, block), block_hash.block_hashes(seed, b, block), strict=False), start=1
    ):
        assert (one == other) == (a[: i * block] == b[: i * block])


@given(ids, st.integers(1, 5), st.integers(0, 8))
def test_a_chain_can_be_continued_from_any_of_its_links(tokens, block, cut):
    seed = block_hash.hash_seed(b"weights")
    whole = block_hash.block_hashes(seed, tokens, block)
    assert len(whole) == len(tokens) // block and all(len(name) == block_hash.SIZE for name in whole)
    cut = min(cut, len(whole))
    rest = block_hash.block_hashes([seed, *whole][cut], tokens[cut * block :], block)
    assert whole[:cut] + rest == whole


def test_the_hash_is_the_documented_one():
    name = hashlib.blake2b(b"parent" + bytes([7, 0, 0, 0, 0, 1, 0, 0]), digest_size=16).digest()
    assert block_hash.block_hashes(b"parent", [7, 256, 9], 2) == [name]
    assert block_hash.block_hashes(b"parent", np.array([7, 256, 9]), 2) == [name]


def test_whatever_enters_the_seed_changes_it():
    seeds = [
        block_hash.hash_seed(b"weights"),
        block_hash.hash_seed(b"other weights"),
        block_hash.hash_seed(b"weights", Shape()),
        block_hash.hash_seed(b"weights", Shape(layers=3)),
        block_hash.hash_seed(b"weights", Shape(), "fp8"),
        block_hash.hash_seed(b"weights", Shape(), salt="tenant"),
        block_hash.hash_seed(b"weights", "ab", "c"),
        block_hash.hash_seed(b"weights", "a", "bc"),
        block_hash.hash_seed(b"weights", b"abc"),
        block_hash.hash_seed(b"weights", "abc"),
        block_hash.hash_seed(b"weights", "tenant"),
    ]
    assert len({*seeds}) == len(seeds) and {len(seed) for seed in seeds} == {block_hash.SIZE}
    assert block_hash.hash_seed(b"weights", Shape(), salt="tenant") == seeds[5]


def weights():
    return {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((), np.int32)}


def test_digest_is_of_contents_not_of_order_or_memory_layout():
    one = weights()
    other = dict(reversed(one.items()))
    other["b"] = np.asfortranarray(one["b"])
    assert not other["b"].flags.c_contiguous
    assert block_hash.tree_digest(one) == block_hash.tree_digest(other)
    assert len(block_hash.tree_digest(one)) == block_hash.SIZE


@pytest.mark.parametrize(
    "change",
    [
        {"b": np.arange(6, dtype=np.float32).reshape(3, 2)},
        {"b": np.arange(6, dtype=np.float32).reshape(2, 3).view(np.int32)},
        {"b": np.nextafter(np.arange(6, dtype=np.float32).reshape(2, 3), np.float32(9))},
        {"c": np.zeros(0)},
        {"a": np.ones((), ml_dtypes.bfloat16)},
    ],
)
def test_digest_sees_every_change(change):
    assert block_hash.tree_digest(weights() | change) != block_hash.tree_digest(weights())


def test_digest_sees_every_piece_of_a_large_array(monkeypatch):
    monkeypatch.setattr(block_hash, "_PIECE", 64)
    data = np.zeros(200, np.uint8).view(ml_dtypes.float8_e4m3fn)
    digests = {block_hash.tree_digest({"a": data})}
    for i in (0, 63, 64, 199):
        changed = data.view(np.uint8).copy()
        changed[i] = 1
        digests.add(block_hash.tree_digest({"a": changed.view(ml_dtypes.float8_e4m3fn)}))
    assert len(digests) == 5


TOKENS = list(range(12))
GOLDEN_SEED = "99405f8230908ffd6f0a3d2951cd54f0"
GOLDEN_HASHES = [
    "3a0ca85d5631b8f09f9523846d154711",
    "3825ae15c34bf51b18f968b79cd7ade6",
    "66fb3713d6d142d5d6450f9fbef5f64a",
]
IMAGE = block_hash.ExtraKey("image", offset=5, length=4)  # tokens 5 to 8: blocks 1 and 2 of four tokens


def hashes(*extra_keys, tokens=TOKENS):
    return block_hash.block_hashes(b"parent", tokens, 4, extra_keys=extra_keys)


def test_block_hashes_without_extra_keys_stay_those_of_stored_files():
    seed = block_hash.hash_seed(b"weights", Shape(), "bf16", 256)
    assert seed.hex() == GOLDEN_SEED
    assert [name.hex() for name in block_hash.block_hashes(seed, TOKENS, 4)] == GOLDEN_HASHES
    assert block_hash.block_hashes(seed, TOKENS, 4, extra_keys=()) == block_hash.block_hashes(seed, TOKENS, 4)


def test_block_hashes_extra_keys_change_the_blocks_of_their_tokens_and_all_after():
    plain = hashes()
    assert hashes(IMAGE)[0] == plain[0]
    assert not set(hashes(IMAGE)[1:]) & set(plain)
    assert hashes(IMAGE._replace(identifier="other"))[1:] != hashes(IMAGE)[1:]
    assert hashes(IMAGE._replace(offset=12)) == plain  # after the last block
    assert hashes(IMAGE._replace(offset=9, length=1))[:2] == plain[:2]


def test_block_hashes_tell_the_positions_of_extra_keys_apart():
    distinct = [
        hashes(),
        hashes(IMAGE),
        hashes(IMAGE._replace(offset=6)),
        hashes(IMAGE, IMAGE._replace(offset=6)),
        hashes(block_hash.ExtraKey("image")),  # of all tokens
        hashes(block_hash.ExtraKey("adapter")),
    ]
    assert len({names[-1] for names in distinct}) == len(distinct)


def test_block_hashes_do_not_depend_on_the_order_of_extra_keys():
    adapter = block_hash.ExtraKey("adapter")
    assert hashes(IMAGE, adapter) == hashes(adapter, IMAGE)


def test_block_hashes_continue_a_chain_with_extra_keys():
    keys = (IMAGE, block_hash.ExtraKey("adapter"))
    whole = hashes(*keys)
    for done in (1, 2):
        rest = block_hash.block_hashes(whole[done - 1], TOKENS[4 * done :], 4, extra_keys=keys, start=4 * done)
        assert whole[:done] + rest == whole
