"""Attention over subsets of the keys: implementations against the reference, merging, passes, tiles, paged operands."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import weights
from v4jax.cache.entry_cache import new_device_entry_cache
from v4jax.cache.host_pool import HostEntryPool
from v4jax.cache.kv_cache_spec import KV_CACHE_DTYPES
from v4jax.cache.paged_cache import PagedEntryReader
from v4jax.cache.pools import new_pool, zeros
from v4jax.core.errors import UserError
from v4jax.kernels import attention
from v4jax.kernels.attention import api, attend, attend_entries, attend_topk, attend_window
from v4jax.kernels.tuning import tuned
from v4jax.nn.kv_cache_interface import DenseEntries

IMPLEMENTATIONS = ["xla", "xla_cpu"]
B, N, S, H = 2, 3, 7, 8
MODEL = dataclasses.replace(weights.config(), head_dim=40)  # 32 numbers and 8 rotary ones
PAGES, SLOTS = 6, 4


def _inputs(queries: int, own_keys: bool):
    """Queries, keys and a mask under which query 0 of row 0 attends nothing."""
    rng = np.random.default_rng(queries)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    mask_BTS = rng.random((B, queries, S)) < 0.6
    mask_BTS[0, 0] = False
    return draw(B, queries, N, H), draw(B, queries, S, H) if own_keys else draw(B, S, H), jnp.asarray(mask_BTS)


def _assert_close(got, want, atol=1e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize("queries", [3, 11])
def test_attend_equals_the_reference(impl, own_keys, queries):
    assert 3 <= tuned("attention")["max_decode_queries"] < 11  # both operand orders of xla_cpu
    operands = _inputs(queries, own_keys)
    _assert_close(attend(*operands, impl=impl), attend(*operands, impl="ref"))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_attend_gradients_equal_those_of_the_reference(impl):
    q_BTNH, keys_BSH, mask_BTS = _inputs(3, False)

    def loss(q_BTNH, keys_BSH, sink_N, impl):
        return jnp.sum(jnp.sin(attend(q_BTNH, keys_BSH, mask_BTS, impl=impl)[0].normalize(sink_N)[0]))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    arguments = (q_BTNH, keys_BSH, jnp.asarray([0.0, 2.0, -1.0]))
    _assert_close(gradients(*arguments, impl), gradients(*arguments, "ref"))


def test_attend_refuses_an_unknown_implementation():
    with pytest.raises(UserError, match="unknown implementation 'fast'; one of ref, xla, xla_cpu"):
        attend(*_inputs(1, False), impl="fast")


def test_attend_of_a_query_without_keys_sums_to_zero():
    part, p_BTNS = attend(*_inputs(2, False))
    assert not np.any(part.sum_BTN1[0, 0])
    assert not np.any(p_BTNS[0, 0])
    assert np.isfinite(part.max_BTN1).all()


def test_merge_equals_attention_over_all_keys():
    q_BTNH, keys_BSH, mask_BTS = _inputs(4, False)
    sink_N = jnp.asarray([0.0, 3.0, -40.0])
    parts = [attend(q_BTNH, keys_BSH[:, s], mask_BTS[..., s])[0] for s in (slice(3), slice(3, None))]
    whole = attend(q_BTNH, keys_BSH, mask_BTS)[0]
    _assert_close(parts[0].merge(parts[1]).normalize(sink_N), whole.normalize(sink_N))


def test_normalize_is_a_softmax_with_a_sink_without_value():
    q_BTNH, keys_BSH, mask_BTS = _inputs(4, False)
    sink_N = jnp.asarray([0.0, 3.0, -3.0])
    logits_BTNS = jnp.einsum("BTNH,BSH->BTNS", q_BTNH, keys_BSH) * H**-0.5
    logits_BTNS = jnp.where(mask_BTS[:, :, None], logits_BTNS, -jnp.inf)
    sinks = jnp.broadcast_to(sink_N[:, None], (*logits_BTNS.shape[:3], 1))
    p_BTNS = jax.nn.softmax(jnp.concatenate([logits_BTNS, sinks], -1), axis=-1)[..., :-1]
    got = attend(q_BTNH, keys_BSH, mask_BTS)[0].normalize(sink_N)[0]
    np.testing.assert_allclose(got, jnp.einsum("BTNS,BSH->BTNH", p_BTNS, keys_BSH), atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_attend_window_reads_the_last_tokens_of_the_document(packed):
    q_BTNH, keys_BSH, _ = _inputs(4, False)
    query_BT, key_BS = np.broadcast_to([5, 6, 7, 8], (B, 4)), np.broadcast_to([8, -(2**30), 4, 5, 6, 7, 3], (B, S))
    documents = np.array([1, 1, 1, 1, 2, 2, 2, 3, 3])  # of each token
    segments = (documents[query_BT], documents[np.maximum(key_BS, 0)]) if packed else (None, None)
    mask_BTS = np.zeros((B, 4, S), bool)
    for b, t, s in np.ndindex(B, 4, S):
        mask_BTS[b, t, s] = 0 <= query_BT[b, t] - key_BS[b, s] < 3
        mask_BTS[b, t, s] &= not packed or segments[0][b, t] == segments[1][b, s]
    got = attend_window(q_BTNH, keys_BSH, query_BT, key_BS, *segments, window=3)
    _assert_close(got, attend(q_BTNH, keys_BSH, jnp.asarray(mask_BTS), impl="ref")[0])


@pytest.mark.parametrize("queries", [2, 12])
def test_attend_entries_in_passes_equals_one_pass(monkeypatch, queries):
    q_BTNH, keys_BSH, _ = _inputs(queries, False)
    entries, visible = DenseEntries(keys_BSH), jnp.int32(6)
    mask = lambda first, count: jnp.broadcast_to(first + jnp.arange(count) < 6, (B, queries, count))
    want = attend_entries(q_BTNH, entries, mask, visible, kind="hca", impl="ref")
    passes = {"max_single_pass_entries": 1, "entries_per_decode_pass": 4, "hca_entries_per_prefill_pass": 3}
    numbers = tuned("attention") | passes
    monkeypatch.setattr(api, "tuned", lambda operation, *_: numbers)
    got = attend_entries(q_BTNH, entries, mask, visible, kind="hca")
    sink_N = jnp.zeros(N)
    _assert_close(got.normalize(sink_N), want.normalize(sink_N))


@pytest.mark.parametrize("numbers", [{"query_tile": 2}, {"query_tile": 4, "max_batched_tiles": 1}])
def test_map_query_tiles_equals_a_single_tile(monkeypatch, numbers):
    """Batched tiles, and tiles one by one; 9 queries leave a remainder."""

    @dataclasses.dataclass
    class Rows:
        kv_BSH: jax.Array
        index_BS: jax.Array

        def padded(self, count):
            pad = lambda a, value: jnp.pad(a, ((0, 0), (0, count)) + ((0, 0),) * (a.ndim - 2), constant_values=value)
            return Rows(pad(self.kv_BSH, 0), pad(self.index_BS, -(2**30)))

    jax.tree_util.register_dataclass(Rows, ["kv_BSH", "index_BS"], [])
    rng, window, T = np.random.default_rng(0), 2, 9
    index_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    queries = (jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.float32), index_BT)
    rows = Rows(
        jnp.asarray(rng.standard_normal((B, window + T, H)), jnp.float32), jnp.arange(-window, T) + 0 * index_BT[:, :1]
    )

    def one(queries, rows, entries):
        part = attend_window(queries[0], rows.kv_BSH, queries[1], rows.index_BS, None, None, window=window)
        return part.o_BTNH / part.sum_BTN1, queries[1] * 2, entries

    o, double, entries = attention.map_query_tiles(one, queries, rows, lambda times: times, window)
    assert entries == 1
    small = tuned("attention") | numbers
    monkeypatch.setattr("v4jax.kernels.attention.query_tiles.tuned", lambda operation, *_: small)
    tiled = attention.map_query_tiles(one, queries, rows, lambda times: times, window)
    assert tiled[2] is None
    _assert_close(tiled[:2], (o, double))


def _reader(kv_cache_dtype: str, dtype) -> PagedEntryReader:
    """A pool of random rows, read through block tables of which one is not full."""
    rng = np.random.default_rng(1)
    rows = jnp.asarray(rng.standard_normal((PAGES, SLOTS, MODEL.head_dim)), jnp.float32)
    pool = new_pool(MODEL, "main", PAGES, SLOTS, kv_cache_dtype)
    pool = pool.write(*np.meshgrid(np.arange(PAGES), np.arange(SLOTS), indexing="ij"), rows)
    return PagedEntryReader(pool, None, None, None, jnp.asarray([[4, 0, 2], [1, 5, -1]], jnp.int32), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_operands_describe_the_rows_of_the_closures(kv_cache_dtype, dtype):
    reader = _reader(kv_cache_dtype, jnp.dtype(dtype))
    operands = reader.operands()
    assert operands.size == reader.size == 3 * SLOTS
    picks_BTK = jnp.asarray([[[11, 0, -1], [5, 6, 7]], [[7, 3, 0], [9, -1, -1]]], jnp.int32)
    np.testing.assert_array_equal(operands.gather_entries(picks_BTK)[0], reader.gather_entries(picks_BTK)[0])
    for first, count in ((0, 3 * SLOTS), (SLOTS, SLOTS), (5, 5), (9, 3)):
        np.testing.assert_array_equal(operands.read_entries(first, count), reader.read_entries(first, count))


def test_operands_are_absent_where_no_kernel_can_read_the_entries():
    pool = new_pool(MODEL, "main", PAGES, SLOTS, "fp8")
    host = HostEntryPool(jnp.zeros((PAGES, SLOTS, pool.row.words), jnp.uint32), pool.row)
    cache = new_device_entry_cache(zeros(pool.row, 1, 9), PAGES, SLOTS)
    assert (
        PagedEntryReader(host, None, cache, None, jnp.zeros((1, 1), jnp.int32), jnp.dtype("float32")).operands() is None
    )
    assert DenseEntries(jnp.zeros((1, 4, H))).operands() is None


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_attend_topk_by_closures_equals_the_reference_by_operands(impl, kv_cache_dtype):
    reader = _reader(kv_cache_dtype, jnp.dtype("float32"))
    q_BTNH = jnp.asarray(np.random.default_rng(2).standard_normal((2, 2, N, MODEL.head_dim)), jnp.float32)
    picks_BTK = jnp.asarray([[[11, 0, -1], [5, 6, 7]], [[7, 3, 0], [-1, -1, -1]]], jnp.int32)
    *got, after = attend_topk(q_BTNH, reader, picks_BTK, impl=impl)
    *want, _ = attend_topk(q_BTNH, reader, picks_BTK, impl="ref")
    assert after is reader
    _assert_close(got, want)
    _assert_close(attend_topk(q_BTNH, reader.operands(), picks_BTK, impl=impl)[:2], want)
    assert not np.any(got[0].sum_BTN1[1, 1])


def test_attend_entries_by_closures_equals_that_by_operands():
    reader = _reader("fp8", jnp.dtype("float32"))
    q_BTNH = jnp.asarray(np.random.default_rng(3).standard_normal((2, 2, N, MODEL.head_dim)), jnp.float32)
    mask = lambda first, count: jnp.broadcast_to(first + jnp.arange(count) < 7, (2, 2, count))
    by_closures, by_operands = (
        attend_entries(q_BTNH, entries, mask, jnp.int32(7), kind="csa") for entries in (reader, reader.operands())
    )
    for one, other in zip(jax.tree.leaves(by_closures), jax.tree.leaves(by_operands), strict=True):
        np.testing.assert_array_equal(one, other)


def test_attend_topk_reference_reads_closures_where_there_are_no_operands():
    q_BTNH, keys_BSH, _ = _inputs(2, False)
    picks_BTK = jnp.asarray([[[6, 0], [1, -1]], [[2, 3], [4, 5]]], jnp.int32)
    _assert_close(
        attend_topk(q_BTNH, DenseEntries(keys_BSH), picks_BTK, impl="ref")[:2],
        attend_topk(q_BTNH, DenseEntries(keys_BSH), picks_BTK)[:2],
    )
