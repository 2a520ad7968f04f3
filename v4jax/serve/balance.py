"""Assignment of requests to the devices of a mesh, and the sum of the devices' counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from v4jax.cache import block_hash
from v4jax.serve.scheduler import Scheduler


def select_scheduler(
    schedulers: Sequence[Scheduler],
    prompt: Sequence[int],
    max_tokens: int,
    seed: bytes | None,
    num_offloaded: Callable[[Sequence[bytes]], Sequence[int]] | None = None,
    extra_keys: Sequence[block_hash.ExtraKey] = (),
) -> Scheduler:
    """Choose the scheduler with the fewest tokens left to compute, the new request included.

    Prompt tokens in cached blocks, of the device or of its offload tiers, do not count. Ties go to the scheduler that
    has received the fewest requests.

    Args:
        schedulers: one per device.
        prompt: token ids of the request.
        max_tokens: maximum new tokens of the request.
        seed: seed of the prompt's block hashes; None ignores the caches.
        num_offloaded: maps block hashes to the number of prefix blocks in the tiers of each device; None without tiers.
        extra_keys: extra keys of the prompt's block hashes.
    """
    if len(schedulers) == 1:
        return schedulers[0]
    block = schedulers[0].block_size
    names = [] if seed is None else block_hash.block_hashes(seed, prompt[:-1], block, extra_keys=extra_keys)
    held = num_offloaded(names) if num_offloaded is not None and names else [0] * len(schedulers)

    def cost(scheduler: Scheduler, held: int) -> tuple[int, int]:
        found = max(scheduler.block_pool.match_prefix(names)[0], held)
        before = sum(request.max_len - request.position for request in scheduler.requests.values())
        return before + len(prompt) + max_tokens - found * block, scheduler.arrivals

    costs = [cost(scheduler, blocks) for scheduler, blocks in zip(schedulers, held, strict=True)]
    return schedulers[costs.index(min(costs))]


def merge_stats(schedulers: Sequence[Scheduler]) -> dict[str, float]:
    """Combine `Scheduler.stats` of all devices: sums, and the mean of kv_cache_usage_perc.

    prefix_cache_hit_rate is the fraction of hits in the queries of the prefix cache; prefix_cache_hit_ceiling the
    fraction of repeats, the hit rate of an unlimited cache. The latter is an underestimate after very many queries
    (`BlockPool.stats`).
    """
    each = [scheduler.stats() for scheduler in schedulers]
    total = {name: sum(stats[name] for stats in each) for name in each[0]}
    queries = max(total["prefix_cache_queries"], 1)
    return total | {
        "kv_cache_usage_perc": total["kv_cache_usage_perc"] / len(each),  # all devices have equally many blocks
        "prefix_cache_hit_rate": total["prefix_cache_hits"] / queries,
        "prefix_cache_hit_ceiling": total["prefix_cache_repeats"] / queries,
    }
