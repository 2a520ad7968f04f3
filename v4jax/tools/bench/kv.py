"""Suite `kv`: KV-cache bytes per token by layout, from the formula and counted in allocated arrays."""

from __future__ import annotations

import jax

from v4jax.cache.kv_cache_spec import KV_CACHE_DTYPES, KVCacheSpec
from v4jax.cache.pools import new_pool
from v4jax.config import Config, load
from v4jax.core.errors import UserError
from v4jax.core.reporting import print_table
from v4jax.tools.bench.report import record

PUBLISHED = ("v4_flash", "v4_pro")
_PAGES = 2  # blocks that are allocated to count bytes; all blocks of a pool have the same size
_MEGATOKEN = 2**20


def run(config: Config) -> list[dict]:
    """Print one table of cache bytes of the published models and of `config`, and return its records.

    Raises:
      UserError: A model has no layer that keeps entries.
    """
    configs = {each.name: each for each in [*map(load, PUBLISHED), config]}
    rows, records = [], []
    for each in configs.values():
        if set(each.model.layer_types) == {"swa"}:
            raise UserError(f"{each.name} has window layers alone and keeps no entries; choose another --config")
        plain = KVCacheSpec(each.model, "bf16").token_bytes
        for name in KV_CACHE_DTYPES:
            layout = KVCacheSpec(each.model, name)
            formula, measured = layout.token_bytes, measured_token_bytes(layout)
            rows.append(
                [
                    each.name,
                    name,
                    layout.entry_bytes,
                    layout.key_bytes if "csa" in each.model.layer_types else "",
                    f"{formula:,.2f}",
                    f"{measured:,.2f}",
                    f"{formula / plain:.0%}",
                    f"{formula * _MEGATOKEN / 2**30:.2f} GiB",
                    f"{layout.state_bytes() / 2**20:.2f} MiB",
                ]
            )
            at = {"config": each.name, "precision": name}
            records += [
                record("kv", "bytes_per_token", [formula], "B", source="formula", **at),
                record("kv", "bytes_per_token", [measured], "B", source="measured", **at),
                record("kv", "record_bytes", [layout.state_bytes()], "B", source="formula", **at),
            ]
    header = ["config", "layout", "B/entry", "B/key", "B/token", "measured", "of bf16", "2^20 tokens", "a sequence"]
    print_table("KV cache: entries and indexer keys by token; window rows and tails by sequence", header, rows)
    return records


def measured_token_bytes(layout: KVCacheSpec) -> float:
    """Allocate pools for all layers of the model, and return their bytes divided by the tokens they hold."""
    pools = []
    for kind in layout.model.layer_types:
        if kind == "swa":
            continue
        for part in ("main", "index") if kind == "csa" else ("main",):
            pools.append(new_pool(layout.model, part, _PAGES, layout.entries(kind), layout.kv_cache_dtype))
    return sum(array.nbytes for array in jax.tree.leaves(pools)) / (_PAGES * layout.block_size)
