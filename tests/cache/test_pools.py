"""Pools: what is written is read back as the layout rounds it, whatever the pages, and nothing else is touched."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden import weights
from v4jax import config
from v4jax.cache.entry_pool import FloatPool
from v4jax.cache.kv_cache_spec import KV_CACHE_DTYPES, entry_format
from v4jax.cache.pools import Bf16Pool, QuantizedPool, new_pool
from v4jax.core import qtensor

PAGES, SLOTS = 3, 4
SMALL = dataclasses.replace(weights.config(), head_dim=40)  # 32 numbers and 8 rotary ones
quantize = jax.jit(qtensor.quantize, static_argnums=(1, 2))
dequantize = jax.jit(qtensor.dequantize, static_argnames=("format", "impl"))
write = jax.jit(lambda pool, page, slot, rows: pool.write(page, slot, rows), donate_argnums=0)
read = jax.jit(lambda pool, page, slot, dtype=jnp.float32: pool.gather(page, slot, dtype), static_argnums=3)
read_pages = jax.jit(lambda pool, pages: pool.gather_blocks(pages).decode(jnp.float32))
CASES = [(kind, layout) for layout in KV_CACHE_DTYPES for kind in ("main", "index")]


def stored(kind: str, layout: str, rows: np.ndarray) -> np.ndarray:
    """What a pool makes of float32 rows, by the spec and without a pool."""
    form = entry_format(SMALL, kind, layout)
    if not form.group:
        return rows.astype(jnp.dtype(form.format)).astype(np.float32)
    split = form.width - form.rotary
    values = dequantize(*quantize(rows[..., :split], form.format, form.group), form.format, impl="cast")
    rotary = rows[..., split:].astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.concatenate([values, rotary], axis=-1)


def rows_of(kind: str, *shape: int, seed: int = 0) -> np.ndarray:
    width = entry_format(SMALL, kind, "auto").width
    return np.random.RandomState(seed).standard_normal((*shape, width)).astype(np.float32)


@pytest.mark.parametrize("kind, layout", CASES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    places=st.lists(
        st.tuples(st.integers(-2, PAGES + 1), st.integers(-2, SLOTS + 1)), min_size=6, max_size=6, unique=True
    )
)
def test_reads_give_what_was_written_and_places_out_of_range_are_dropped(kind, layout, places):
    page, slot = np.array(places, np.int32).T.reshape(2, 2, 3)
    rows = rows_of(kind, 2, 3)
    pool = write(new_pool(SMALL, kind, PAGES, SLOTS, layout), page, slot, rows)
    want = np.zeros((PAGES, SLOTS, rows.shape[-1]), np.float32)
    inside = (page >= 0) & (page < PAGES) & (slot >= 0) & (slot < SLOTS)
    want[page[inside], slot[inside]] = stored(kind, layout, rows)[inside]
    every = np.meshgrid(np.arange(PAGES), np.arange(SLOTS), indexing="ij")
    np.testing.assert_array_equal(read(pool, *every), want)
    order = np.array([[2, 0], [1, 1]], np.int32)
    np.testing.assert_array_equal(read_pages(pool, order), want[order])


@pytest.mark.parametrize("kind, layout", CASES)
def test_a_slot_is_overwritten_whole(kind, layout):
    first, second = rows_of(kind, 1) * 1000, rows_of(kind, 1, seed=1) / 1000
    pool = new_pool(SMALL, kind, PAGES, SLOTS, layout)
    place = np.array([1], np.int32), np.array([2], np.int32)
    for rows in (first, second):
        pool = write(pool, *place, rows)
    np.testing.assert_array_equal(read(pool, *place), stored(kind, layout, second))


@pytest.mark.parametrize("kind, layout", CASES)
def test_bfloat16_reads_equal_the_rounded_float32_ones(kind, layout):
    page, slot = np.arange(PAGES), np.zeros(PAGES, np.int32)
    pool = write(new_pool(SMALL, kind, PAGES, SLOTS, layout), page, slot, rows_of(kind, PAGES))
    narrow, wide = (read(pool, page, slot, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert narrow.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("kind, layout", CASES)
def test_arrays_are_the_planes_of_the_spec(kind, layout):
    model = config.load("v4_flash").model
    pool = new_pool(model, kind, 2, 64, layout)
    form = entry_format(model, kind, layout)
    assert isinstance(pool, QuantizedPool if form.group else Bf16Pool) and pool.shape == (2, 64, form.width)
    arrays = jax.tree.leaves(pool)
    assert sorted((a.shape[-1], str(a.dtype)) for a in arrays) == sorted(form.planes.values())
    assert {a.shape[:2] for a in arrays} == {(2, 64)}
    assert isinstance(new_pool(SMALL, kind, 2, 64, "auto"), FloatPool)  # float32
    assert sum(a.nbytes for a in arrays) == 2 * 64 * form.nbytes


@pytest.mark.parametrize("kind, layout", CASES)
def test_writes_are_in_place_and_copy_nothing(kind, layout):
    """The program needs no room for a plane of the pool, in its own type or in a wider one."""
    pool = new_pool(SMALL, kind, 512, SLOTS, layout)
    place = np.array([1], np.int32), np.array([0], np.int32)
    memory = write.lower(pool, *place, rows_of(kind, 1)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(a.nbytes for a in jax.tree.leaves(pool))
    assert memory.temp_size_in_bytes < min(a.nbytes for a in jax.tree.leaves(pool))
    assert jax.tree.structure(write(pool, *place, rows_of(kind, 1))) == jax.tree.structure(pool)


def test_a_row_with_nan_shows_and_harms_no_other():
    rows = rows_of("main", 2)
    rows[0, 3] = np.nan
    for layout in KV_CACHE_DTYPES:
        place = np.array([1, 1]), np.array([0, 1])
        got = np.asarray(read(write(new_pool(SMALL, "main", PAGES, SLOTS, layout), *place, rows), *place))
        assert np.isnan(got[0]).any() and np.array_equal(got[1], stored("main", layout, rows)[1])
