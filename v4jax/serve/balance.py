"""Which device of a mesh a request goes to, and what the books of all of them say together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from v4jax.cache import block_hash
from v4jax.serve.scheduler import Scheduler


def select_rank(
    schedulers: Sequence[Scheduler],
    prompt: Sequence[int],
    max_tokens: int,
    seed: bytes | None,
    below: Callable[[Sequence[bytes]], Sequence[int]] | None = None,
) -> Scheduler:
    """The scheduler that has least to do, in tokens, until the request is done; of several the one that was given
    fewest requests.

    What it finds of the prompt, or tiers below it hold, need not be read. seed: of the names of the prompt's blocks, or
    None. below: blocks that the tiers below each hold of those with such names.
    """
    if len(schedulers) == 1:
        return schedulers[0]
    block = schedulers[0].block_size
    names = [] if seed is None else block_hash.block_hashes(seed, prompt[:-1], block)
    held = below(names) if below is not None and names else [0] * len(schedulers)

    def cost(scheduler: Scheduler, held: int) -> tuple[int, int]:
        found = max(scheduler.block_pool.match_prefix(names)[0], held)
        before = sum(sequence.max_len - sequence.position for sequence in scheduler.requests.values())
        return before + len(prompt) + max_tokens - found * block, scheduler.arrivals

    costs = [cost(scheduler, blocks) for scheduler, blocks in zip(schedulers, held, strict=True)]
    return schedulers[costs.index(min(costs))]


def merge_stats(schedulers: Sequence[Scheduler]) -> dict[str, float]:
    """`Scheduler.stats`, counts added up, rates those of all."""
    each = [scheduler.stats() for scheduler in schedulers]
    total = {name: sum(stats[name] for stats in each) for name in each[0]}
    queries = max(total["queries"], 1)
    return total | {"hit_rate": total["hits"] / queries, "hit_ceiling": total["repeated"] / queries}
