"""Data that scheduler and engine exchange: requests, and plans of the next step."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from v4jax.cache.block_hash import ExtraKey


class RequestStatus(enum.Enum):
    WAITING = enum.auto()
    PREFILL = enum.auto()
    RUNNING = enum.auto()  # its whole prompt has been sent to the device
    PREEMPTED = enum.auto()  # frees its slot when its plans in flight are committed, then waits
    FINISHED = enum.auto()
    ABORTED = enum.auto()
    ERROR = enum.auto()


@dataclass(eq=False)
class Request:
    """State of one request. The scheduler owns it; the engine only reads it.

    A run of a request lasts from admission to preemption or end.

    Attributes:
        priority: lower ones are served first.
        hash_seed: seed of its block hashes, its cache salt included; None excludes it from the prefix cache.
        tokens: prompt and generated token ids.
        extra_keys: what its token ids do not tell; part of its block hashes.
        num_cached_tokens: prompt tokens found in the prefix cache when it was first admitted.
        block_ids: its KV blocks, in order of position.
        state_slot: its state slot; 0 means none.
        num_prefill_tokens: tokens to prefill in the current run.
        num_scheduled_tokens: tokens that prefill has sent to the device.
        num_computed_tokens: tokens whose entries committed plans have written.
        num_inflight_decodes: decode steps of it that are not committed.
        num_cached_blocks: prefix blocks reused from the cache in the current run.
        num_published_blocks: leading blocks that it has found in or offered to the prefix cache.
    """

    id: Hashable
    prompt: tuple[int, ...]
    max_tokens: int
    hash_seed: bytes | None
    arrival: int
    tokens: list[int]
    extra_keys: tuple[ExtraKey, ...] = ()
    priority: int = 0
    status: RequestStatus = RequestStatus.WAITING
    num_cached_tokens: int = 0
    preemptions: int = 0
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks; grows with `tokens`
    max_len_reached: int = 0  # most tokens that it had before a preemption dropped some
    # The fields below belong to the current run.
    block_ids: list[int] = field(default_factory=list)
    state_slot: int = 0
    num_prefill_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0
    num_inflight_decodes: int = 0
    last_step: int = 0  # step_id of the last plan with it
    num_cached_blocks: int = 0
    num_published_blocks: int = 0
    last_snapshot_boundary: int = 0  # last block boundary at which a snapshot was considered
    snapshots: list[bytes] = field(default_factory=list)  # hashes of the snapshots that it made
    decode_snapshot: bytes | None = None  # hash of the newest snapshot made while decoding
    pending_prefix_hash: bytes | None = None  # hash of the prefix that its prefill will publish

    @property
    def rank(self) -> tuple[int, int]:
        """Order in which requests are served."""
        return self.priority, self.arrival

    @property
    def max_len(self) -> int:
        return len(self.prompt) + self.max_tokens

    @property
    def is_replay(self) -> bool:
        """Whether its next token was already generated in an earlier run."""
        return len(self.tokens) < self.max_len_reached

    @property
    def position(self) -> int:
        """Computed tokens once all plans in flight are done, if each decode step adds one token."""
        return max(self.num_computed_tokens, self.num_scheduled_tokens) + self.num_inflight_decodes


class PrefillChunk(NamedTuple):
    """Prefill tokens[start : start + count]; start 0 resets the state slot first. last: sample a token after it."""

    request: Request
    start: int
    count: int
    last: bool


class DecodeRow(NamedTuple):
    """Decode one token or more. position: of the input token; with lookahead, its lower bound."""

    request: Request
    position: int


@dataclass(frozen=True, eq=False)
class SchedulerOutput:
    """Plan of one step: first state copies, then prefill and decode in any order.

    The engine must build the block tables from `Request.block_ids` before it calls the scheduler again.

    Attributes:
        copies: pairs (source slot, target slot); no slot is both a source and a target.
    """

    step_id: int
    copies: tuple[tuple[int, int], ...]
    prefill: PrefillChunk | None
    decode: tuple[DecodeRow, ...]

    @property
    def requests(self) -> list[Request]:
        return [row.request for row in (self.prefill, *self.decode) if row is not None]
