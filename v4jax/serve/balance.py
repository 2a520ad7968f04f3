"""Which device of a mesh a request goes to, and what the books of all of them say together."""

from __future__ import annotations

from collections.abc import Sequence

from v4jax.cache import prefix
from v4jax.serve.scheduler import Scheduler


def choose(schedulers: Sequence[Scheduler], prompt: Sequence[int], max_tokens: int, seed: bytes | None) -> Scheduler:
    """The scheduler that has least to do, in tokens, until the request is done; of several the one that was given
    fewest requests.

    What it finds of the prompt need not be read. seed: of the names of the prompt's blocks, or None.
    """
    if len(schedulers) == 1:
        return schedulers[0]
    block = schedulers[0].block
    names = [] if seed is None else prefix.chain(seed, prompt[:-1], block)

    def cost(scheduler: Scheduler) -> tuple[int, int]:
        found, _ = scheduler.blocks.match(names)
        before = sum(sequence.limit - sequence.position for sequence in scheduler.sequences.values())
        return before + len(prompt) + max_tokens - found * block, scheduler.arrivals

    return min(schedulers, key=cost)


def together(schedulers: Sequence[Scheduler]) -> dict[str, float]:
    """`Scheduler.stats`, counts added up, rates those of all."""
    each = [scheduler.stats() for scheduler in schedulers]
    total = {name: sum(stats[name] for stats in each) for name in each[0]}
    queries = max(total["queries"], 1)
    return total | {"hit_rate": total["hits"] / queries, "hit_ceiling": total["repeated"] / queries}
