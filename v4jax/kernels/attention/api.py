"""Public API of attention over subsets of the keys. It selects an implementation by platform."""

from __future__ import annotations

from collections.abc import Callable

import jax

from v4jax.kernels.attention import ref, xla, xla_cpu
from v4jax.kernels.attention.operands import EntrySource
from v4jax.kernels.attention.softmax_partial import SoftmaxPartial
from v4jax.kernels.dispatch import select
from v4jax.kernels.tuning import tuned

_ATTEND = {"ref": ref.attend, "xla": xla.attend, "xla_cpu": xla_cpu.attend}
_TOPK = {"ref": ref.attend_topk, "xla": xla.attend_topk, "xla_cpu": xla_cpu.attend_topk}
_PREFERRED = {"cpu": "xla_cpu"}


def attend(
    q_BTNH: jax.Array, keys: jax.Array, mask_BTS: jax.Array, *, impl: str | None = None
) -> tuple[SoftmaxPartial, jax.Array]:
    """Attend to keys, which are also the values (spec 2.3, step 9).

    Args:
        q_BTNH: [B, T, N, H], queries. Logits are scaled by H ** -0.5.
        keys: [B, S, H] if all queries of a batch row share the keys, or [B, T, S, H] if each query has its own. They
            are cast to the dtype of the queries.
        mask_BTS: bool [B, T, S], True for the keys that a query attends.
        impl: "ref", "xla", "xla_cpu", or None for the preferred one of the platform.

    Returns:
        The partial softmax and exp(logit - max), float32 [B, T, N, S]. A fully masked query has sum 0.

    Raises:
        UserError: `impl` is unknown.
    """
    operands = (q_BTNH, keys, mask_BTS)
    return _ATTEND[select(impl, _ATTEND, _PREFERRED, portable="xla", operands=operands)](*operands)


def attend_window(
    q_BTNH: jax.Array,
    kv_BSH: jax.Array,
    query_index_BT: jax.Array,
    key_index_BS: jax.Array,
    query_segments_BT: jax.Array | None,
    key_segments_BS: jax.Array | None,
    *,
    window: int,
    impl: str | None = None,
) -> SoftmaxPartial:
    """Attend from each query to the last `window` tokens of its document, itself included (spec 2.3, step 9).

    Args:
        q_BTNH: [B, T, N, H], queries.
        kv_BSH: [B, S, H], keys, which are also the values, in any order.
        query_index_BT: int32 [B, T], index of each query in its row's history.
        key_index_BS: int32 [B, S], index of each key; `window` or more below every query for an empty row.
        query_segments_BT: int32 [B, T], document of each query; None if rows are not packed.
        key_segments_BS: int32 [B, S], document of each key; None if rows are not packed.
        window: number of tokens that a query attends.
        impl: as in `attend`.
    """
    ago_BTS = query_index_BT[:, :, None] - key_index_BS[:, None, :]
    seen_BTS = (ago_BTS >= 0) & (ago_BTS < window)
    if query_segments_BT is not None:
        seen_BTS &= query_segments_BT[:, :, None] == key_segments_BS[:, None, :]
    return attend(q_BTNH, kv_BSH, seen_BTS, impl=impl)[0]


def attend_entries(
    q_BTNH: jax.Array,
    entries: EntrySource,
    mask: Callable[[jax.Array | int, int], jax.Array],
    num_visible: jax.Array,
    *,
    kind: str,
    impl: str | None = None,
) -> SoftmaxPartial:
    """Attend from each query to all entries that it sees (spec 2.7).

    Few entries are read at once. More are read in passes up to the last visible one, whose partial softmaxes are
    merged.

    Args:
        q_BTNH: [B, T, N, H], queries.
        entries: the entries, by closures or as `PagedOperands`.
        mask: function (first, count) to bool [B, T, count], True where a query sees the entry.
        num_visible: int32 scalar; no query sees entries from this index on, and they are not read.
        kind: "hca" or "csa", the kind of layer that the number of entries per pass is tuned for.
        impl: as in `attend`.
    """
    numbers = tuned("attention", q_BTNH)
    if entries.size <= numbers["max_single_pass_entries"]:
        return attend(q_BTNH, entries.read_entries(0, entries.size), mask(0, entries.size), impl=impl)[0]
    decode = q_BTNH.shape[1] <= numbers["max_decode_queries"]
    size = numbers["entries_per_decode_pass" if decode else f"{kind}_entries_per_prefill_pass"]
    read = lambda i: attend(q_BTNH, entries.read_entries(i * size, size), mask(i * size, size), impl=impl)[0]
    return jax.lax.fori_loop(1, -(-num_visible // size), lambda i, part: part.merge(read(i)), read(0))


def attend_topk(
    q_BTNH: jax.Array, entries: EntrySource, picks_BTK: jax.Array, *, impl: str | None = None
) -> tuple[SoftmaxPartial, jax.Array, EntrySource]:
    """Attend from each query to its picked entries (spec 2.6).

    Args:
        q_BTNH: [B, T, N, H], queries.
        entries: the entries, by closures or as `PagedOperands`.
        picks_BTK: int32 [B, T, K], indices of the entries of each query; -1 for none.
        impl: as in `attend`. "ref" reads `entries.operands()` where there are some.

    Returns:
        The partial softmax; exp(logit - max), float32 [B, T, N, K], 0 where there is no entry; and the source of
        entries after the read.
    """
    operands = (q_BTNH, entries, picks_BTK)
    return _TOPK[select(impl, _TOPK, _PREFERRED, portable="xla", operands=operands)](*operands)


def use_passes(entries: int, k: int) -> bool:
    """Return whether a query attends all entries (its top-k covers them) and they are too many to read at once."""
    return entries == k > tuned("attention")["csa_entries_per_prefill_pass"]


def use_gather(entries: int, k: int, queries: int) -> bool:
    """Return whether `queries` queries per row gather their k top-k entries; otherwise they read all through a mask.

    The mask costs matmuls with all entries, the gather costs memory traffic per pick. The tuned bound is an estimate
    for XLA:CPU, which no benchmark has measured yet.
    """
    most = tuned("attention")["max_masked_entries_per_pick"] * k
    return entries > k and (entries > most or queries == 1)
