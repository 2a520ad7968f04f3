"""Suite `eviction`: hit rates of eviction policies on the trace of suite `tiers`, by block hashes, without a model.

Only the bookkeeping of tiers runs (`cache.offload.tier_index`), so the numbers are exact and the same on every machine.
The device tier is filled as by the engine, with two differences: blocks and state snapshots share one budget, and the
requests of a burst run one after the other.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np

from v4jax.cache.block_hash import block_hashes
from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.cache.offload.block_file import BlockKey, BlockSchema
from v4jax.cache.offload.tier_index import TierIndex
from v4jax.config import Config
from v4jax.core.reporting import print_table
from v4jax.tools.bench.report import record
from v4jax.tools.bench.tiers import ANSWER, BURST, CONVERSATIONS, turns

SEEDS = 5
_FORMS = {kind: BlockSchema(kind, ()) for kind in ("block", "record")}
_ROOT, _PLENTY = bytes(16), 1 << 60
# (eviction policy of host and disk, whether only blocks that two requests asked for are admitted there)
ARMS = {"lru": ("lru", False), "lru; asked for twice": ("lru", True), "s3fifo": ("s3fifo", False)}
_TIERS = ("device", "host", "disk")


def run(config: Config) -> list[dict]:
    """One table: blocks found, by tier, policy and room, beside what an infinite cache finds. Means over seeds."""
    layout = KVCacheSpec(config.model, config.cache.kv_cache_dtype, config.cache.block_size)
    sizes = {"block": layout.block_bytes, "record": layout.state_bytes()}
    blocks = 6 * CONVERSATIONS
    each = (sizes["block"] * blocks + sizes["record"] * 2 * CONVERSATIONS) // 20  # a twentieth of all that there is
    device = max(blocks // 16, 8 * BURST + 2) * sizes["block"] + CONVERSATIONS // 8 * sizes["record"]
    rows, records = [], []
    best = [sum(rate.values()) for rate in _rates(layout, sizes, (_PLENTY, 0, 0), *ARMS["lru"])]
    for host, disk in [(1, 0), (2, 0), (4, 0), (8, 0), (2, 4), (4, 8)]:
        budgets = (device, host * each, disk * each)
        found = {name: _rates(layout, sizes, budgets, *arm) for name, arm in ARMS.items()}
        totals = {name: [sum(rate.values()) for rate in rates] for name, rates in found.items()}
        for name, rates in found.items():
            total = totals[name]
            more = [a - b for a, b in zip(total, totals["lru"], strict=True)]
            mean = {tier: statistics.mean(rate[tier] for rate in rates) for tier in _TIERS}
            rows.append(
                [
                    f"{host / 20:.0%}",
                    f"{disk / 20:.0%}" if disk else "none",
                    name,
                    *(f"{mean[tier]:.1%}" for tier in _TIERS),
                    f"{statistics.mean(total):.1%}",
                    f"{statistics.mean(best):.1%}",
                    f"{statistics.mean(more):+.1%}",
                    f"{sum(a > 0 for a in more)}",
                ]
            )
            at = {"config": config.name, "arm": name, "host_share": host / 20, "disk_share": disk / 20}
            records += [
                record("eviction", f"{tier}_hit_rate", [rate[tier] for rate in rates], "ratio", **at) for tier in _TIERS
            ]
            records += [
                record("eviction", "hit_rate", total, "ratio", **at),
                record("eviction", "hit_ceiling", best, "ratio", **at),
                record("eviction", "hit_rate_beyond_lru", more, "ratio", **at),
            ]
    title = f"{config.name}: {CONVERSATIONS} conversations, {SEEDS} seeds; host and disk as shares of all that is kept"
    tiers = [f"of {tier}" for tier in _TIERS]
    header = ["host", "disk", "policy", *tiers, "hits", "ceiling", "beyond lru", "seeds won"]
    print_table(title, header, rows)
    return records


def _rates(layout: KVCacheSpec, sizes, budgets, policy: str, twice: bool) -> list[dict[str, float]]:
    """Return each tier's share of the requested blocks that it held, one dict per seed."""
    return [_replay(layout.block_size, sizes, budgets, policy, twice, seed) for seed in range(SEEDS)]


class _Tiers:
    """Tier indexes of device, host and disk; a tier with a budget of 0 bytes does not exist."""

    def __init__(self, sizes: dict[str, int], budgets: Sequence[int], policy: str):
        self._sizes = sizes
        policies = ("lru", policy, policy)
        self.shelves = [TierIndex(budget, policy) for budget, policy in zip(budgets, policies, strict=True) if budget]

    def put(self, shelf: TierIndex, key: BlockKey, parent: bytes) -> None:
        size = self._sizes[key.kind]
        if key in shelf or size > shelf.budget:
            return
        while not shelf.has_room(size):
            shelf.remove(shelf.next_victim())
        shelf.add(key, parent, size)

    def reach(self, shelves: Sequence[TierIndex], names: list[bytes]) -> int:
        """Return the length in blocks of the longest cached prefix that ends at a state snapshot."""
        best = 0
        for count, name in enumerate(names, 1):
            if not any(_key("block", name) in shelf for shelf in shelves):
                break
            if any(_key("record", name) in shelf for shelf in shelves):
                best = count
        return best


def _replay(block: int, sizes, budgets, policy: str, twice: bool, seed: int) -> dict[str, float]:
    tiers, history, asked, count = _Tiers(sizes, budgets, policy), {}, Counter(), Counter()
    device, *below = tiers.shelves
    rng = np.random.default_rng(seed)
    for burst in turns(block, CONVERSATIONS, 1 << 17, seed):
        for conversation, new in burst:
            prompt = [*history.get(conversation, ()), *new]
            history[conversation] = [*prompt, *rng.integers(2, 1 << 17, ANSWER).tolist()]
            names = block_hashes(_ROOT, history[conversation][:-1], block)  # the last token drawn is not read
            usable = names[: (len(prompt) - 1) // block]
            asked.update(usable)
            goal, least = tiers.reach(tiers.shelves, usable), tiers.reach([device], usable)
            count.update(asked=len(usable))
            for name in usable[:goal]:
                count.update([next(i for i, shelf in enumerate(tiers.shelves) if _key("block", name) in shelf)])
            _bring(tiers, names, goal, least)
            kept = {max(len(usable), 1), len(names)}  # state snapshots at the ends of prompt and answer
            _compute(tiers, names, kept, lambda name: not twice or asked[name] > 1)
    return {tier: count[i] / count["asked"] for i, tier in enumerate(_TIERS)}


def _bring(tiers: _Tiers, names: list[bytes], goal: int, least: int) -> None:
    """Mark the first `goal` blocks and their state snapshot as used, and load those that the device lacks.

    Loaded keys are then on the device and on the host. The device alone holds `least` blocks of the prefix; if that is
    all of it, only the device counts the use.
    """
    device, *below = tiers.shelves
    keys = [(_key("block", name), parent) for parent, name in zip([_ROOT, *names], names[:goal], strict=False)]
    keys += [(_key("record", names[goal - 1]), names[goal - 1])] if goal else []
    for shelf in (device, *below) if goal > least else (device,):
        shelf.touch([key for key, _ in keys])
    for key, parent in keys if goal > least else ():
        if below and key not in device:
            tiers.put(below[0], key, parent)
        tiers.put(device, key, parent)


def _compute(tiers: _Tiers, names: list[bytes], kept: set[int], wanted) -> None:
    """Cache the computed blocks and state snapshots on the device, and store those that are `wanted` in lower tiers."""
    device, *below = tiers.shelves
    for number, name in enumerate(names, 1):
        kinds = ("block", "record") if number in kept else ("block",)
        for kind in kinds:
            key, parent = _key(kind, name), names[number - 2] if number > 1 else _ROOT
            if wanted(name) and not any(key in shelf for shelf in below):
                for shelf in below:
                    tiers.put(shelf, key, parent)
            tiers.put(device, key, parent)
    device.touch([_key("block", name) for name in names])


def _key(kind: str, name: bytes) -> BlockKey:
    return _FORMS[kind].key(name)
