"""`KVConnector`: what a scheduler asks of the tiers below its device; the scheduler's half of vLLM's KV connector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from v4jax.cache.block_pool import BlockPool
from v4jax.serve.request import Request


class KVConnector(Protocol):
    """Loads and stores KV blocks of one device. The scheduler calls every method, in the thread of the engine."""

    def bind(self, block_pool: BlockPool) -> None:
        """Serve this pool from now on, and drop every load and store of the pool before."""
        ...

    def prefetch(self, request: Request, block_hashes: Sequence[bytes]) -> None:
        """Start to load the blocks of a waiting request that the device lacks, once a request."""
        ...

    def is_loading(self, request: Request) -> bool:
        """Whether the admission of a request waits for a load. Changes nothing."""
        ...

    def finish_load(self, request: Request, block_hashes: Sequence[bytes]) -> bool:
        """Enter loaded blocks into the pool, as far as it has room, before a request is admitted.

        Returns False if blocks that were on the device when the load began were evicted since, and a second load
        began; admission then waits again.
        """
        ...
