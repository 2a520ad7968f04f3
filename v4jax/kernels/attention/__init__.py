"""Attention over sets of rows that are keys and values at once, as partial softmaxes that can be merged (spec 2.3)."""

from v4jax.kernels.attention.api import (
    attend,
    attend_entries,
    attend_topk,
    attend_window,
    use_gather,
    use_passes,
)
from v4jax.kernels.attention.operands import EntrySource, PagedOperands, decode_rows
from v4jax.kernels.attention.query_tiles import map_query_tiles
from v4jax.kernels.attention.softmax_partial import SoftmaxPartial

__all__ = [
    "EntrySource",
    "PagedOperands",
    "SoftmaxPartial",
    "attend",
    "attend_entries",
    "attend_topk",
    "attend_window",
    "decode_rows",
    "map_query_tiles",
    "use_gather",
    "use_passes",
]
