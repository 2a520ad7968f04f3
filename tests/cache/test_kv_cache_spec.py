"""Sizes of the cache: the published numbers, arithmetic by hand, and what is refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden import weights
from v4jax import config
from v4jax.cache.kv_cache_spec import (
    KV_CACHE_DTYPES,
    KVCacheSpec,
    default_block_size,
    entry_format,
    validate_block_size,
)
from v4jax.config import Indexer
from v4jax.core.errors import UserError

FLASH, PRO = (config.load(name).model for name in ("v4_flash", "v4_pro"))
SMALL = weights.config()  # head_dim 16 with 8 rotary, indexer 16, ratios 4 and 16, window 8, one layer of each kind


@pytest.mark.parametrize(
    "model, layout, want",
    [  # spec 2.11
        (FLASH, "auto", 6880),
        (FLASH, "bf16", 6880),
        (FLASH, "fp8", 3850.25),
        (FLASH, "fp8_fp4", 3514.25),
        (PRO, "auto", 9848),
        (PRO, "bf16", 9848),
        (PRO, "fp8", 5511.4375),
        (PRO, "fp8_fp4", 5031.4375),
    ],
)
def test_bytes_a_token_are_the_published_ones(model, layout, want):
    assert KVCacheSpec(model, layout).token_bytes == want


def test_records_of_the_published_shape():
    assert [KVCacheSpec(FLASH, name).entry_bytes for name in KV_CACHE_DTYPES] == [1024, 1024, 584, 584]
    assert [KVCacheSpec(FLASH, name).key_bytes for name in KV_CACHE_DTYPES] == [256, 256, 132, 68]
    assert entry_format(FLASH, "main", "fp8").planes == {
        "values": (448, "uint8"),
        "rotary": (64, "uint16"),
        "scales": (8, "uint8"),
    }
    assert entry_format(FLASH, "index", "fp8").planes == {"values": (128, "uint8"), "scales": (4, "uint8")}
    assert entry_format(FLASH, "index", "fp8_fp4").planes == {"values": (64, "uint8"), "scales": (4, "uint8")}


def test_other_shapes_are_padded_to_words():
    assert entry_format(SMALL, "main", "fp8").planes == {
        "values": (8, "uint8"),
        "rotary": (8, "uint16"),
        "scales": (4, "uint8"),
    }
    odd = dataclasses.replace(SMALL, head_dim=38, qk_rope_head_dim=2)  # 36 + 4 + 1 scale
    assert entry_format(odd, "main", "fp8").planes["scales"] == (4, "uint8")
    assert entry_format(odd, "main", "fp8").nbytes == 44
    wide = dataclasses.replace(SMALL, head_dim=208)  # 200 numbers in 4 groups of 50
    assert (entry_format(wide, "main", "fp8").group, entry_format(wide, "main", "fp8").nbytes) == (50, 200 + 16 + 4)


def test_pages_by_hand():
    fp8 = KVCacheSpec(FLASH, "fp8")
    assert (fp8.block_size, fp8.entries("csa"), fp8.entries("hca")) == (256, 64, 2)
    assert fp8.block_bytes == 21 * 64 * (584 + 132) + 20 * 2 * 584
    small = KVCacheSpec(SMALL, "auto")  # float32
    assert small.block_bytes == 64 * (64 + 64) + 16 * 64


def test_records_by_hand():
    """Rings in the model's type; tails float32: [two windows, 4 widths] for CSA and its indexer, [one, 2] for HCA."""
    ring = 8 * 16 * 4
    csa, index, hca = 8 * 4 * 16 * 4, 8 * 4 * 16 * 4, 16 * 2 * 16 * 4
    assert {KVCacheSpec(SMALL, name).state_bytes() for name in KV_CACHE_DTYPES} == {3 * ring + csa + index + hca}
    assert KVCacheSpec(FLASH).state_bytes() == 43 * 131_072 + 21 * 81_920 + 20 * 524_288  # spec 2.11
    on_host = KVCacheSpec(FLASH, num_device_entries=1024)  # HCA tails are in host memory
    assert on_host.state_bytes() == 43 * 131_072 + 21 * 81_920
    rows = 3 * 16 * 4 + 2 * 4 * 16 * 4 + 2 * 16 * 4  # one more in every ring and every tail
    assert KVCacheSpec(SMALL).state_bytes(slack=3) == KVCacheSpec(SMALL).state_bytes() + 3 * rows


@pytest.mark.parametrize("name", config.preset_names())
def test_blocks_of_the_shipped_configs(name):
    assert default_block_size(config.load(name).model) == 256


@given(csa=st.integers(2, 40), factor=st.integers(1, 9), wanted=st.integers(1, 1000))
def test_block_is_the_least_common_multiple_that_is_enough(csa, factor, wanted):
    model = dataclasses.replace(SMALL, compress_rate_csa=csa, compress_rate_hca=csa * factor)
    block = default_block_size(model, wanted)
    assert block == min(n for n in range(csa * factor, wanted + csa * factor, csa * factor) if n >= wanted)
    assert validate_block_size(model, block) == KVCacheSpec(model, block_size=block).block_size == block


def test_only_ratios_in_use_count():
    model = dataclasses.replace(SMALL, layer_types=("swa", "csa"), compress_rate_csa=3, compress_rate_hca=300)
    assert default_block_size(model) == 258 and validate_block_size(model, 6) == 6
    assert default_block_size(dataclasses.replace(SMALL, layer_types=("swa",))) == 256


@pytest.mark.parametrize(
    "block, complaint",
    [
        (200, "cache.block_size of 200 tokens is not a multiple of model.compress_rate_hca 128; take 256"),
        (130, "cache.block_size of 130 tokens is not a multiple of model.compress_rate_csa 4; take 256"),
        (-128, "model.compress_rate_csa 4; take 128"),
    ],
)
def test_a_block_that_a_ratio_does_not_divide(block, complaint):
    with pytest.raises(UserError, match=complaint):
        KVCacheSpec(FLASH, block_size=block)


def test_layouts_that_cannot_be():
    with pytest.raises(UserError, match="unknown kv_cache_dtype 'int8'; one of auto, bf16, fp8, fp8_fp4"):
        KVCacheSpec(FLASH, "int8")
    with pytest.raises(UserError, match="qk_rope_head_dim is all 16; take bf16"):
        KVCacheSpec(dataclasses.replace(SMALL, qk_rope_head_dim=16), "fp8")
    odd = dataclasses.replace(SMALL, indexer=Indexer(index_n_heads=2, index_head_dim=15, index_topk=3))
    with pytest.raises(UserError, match="indexer.index_head_dim 15 is odd; take fp8"):
        KVCacheSpec(odd, "fp8_fp4")
    assert KVCacheSpec(odd, "fp8").key_bytes == 16
    KVCacheSpec(dataclasses.replace(odd, layer_types=("hca",)), "fp8_fp4")  # no keys, nothing to refuse
    with pytest.raises(UserError, match="cache.block_size of -1 tokens; take at least 1"):
        KVCacheSpec(dataclasses.replace(SMALL, layer_types=("swa",)), block_size=-1)


def test_pages_of_a_budget():
    layout = KVCacheSpec(FLASH, "fp8_fp4")
    assert layout.blocks_for(10 * layout.block_bytes) == layout.blocks_for(11 * layout.block_bytes - 1) == 10
    with pytest.raises(UserError, match="holds no page beside the spare one.*give at least 1,799,296"):
        layout.blocks_for(2 * layout.block_bytes - 1)
    with pytest.raises(UserError, match="window layers alone"):
        KVCacheSpec(dataclasses.replace(SMALL, layer_types=("swa", "swa"))).blocks_for(10**9)
