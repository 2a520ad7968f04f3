"""What the scheduler and the engine say to each other: sequences, and plans of what to run next."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"  # all of its prompt has been sent to the device
    PREEMPTED = "preempted"  # leaves its slot when the plans under way are committed, then waits
    FINISHED = "finished"
    ABORTED = "cancelled"
    ERROR = "failed"


@dataclass(eq=False)
class Request:
    """One request. The engine reads `tokens`, `pages` (of block 0 on) and `slot` (its record, 0: none) and writes none.

    computed: tokens whose entries the committed plans have written. sent: tokens that prefill has sent to the device.
    goal: tokens to prefill in this life, which began with admission and ends with preemption. found: blocks that it
    began behind.
    """

    id: Hashable
    prompt: tuple[int, ...]
    max_tokens: int
    hash_seed: bytes | None
    arrival: int
    tokens: list[int]
    status: RequestStatus = RequestStatus.WAITING
    preemptions: int = 0
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks; grows with the tokens
    max_len_reached: int = 0  # most tokens that it had before a preemption that took some of them
    # The rest is of one life.
    block_ids: list[int] = field(default_factory=list)
    state_slot: int = 0
    num_prefill_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0
    num_inflight_decodes: int = 0
    last_step: int = 0  # serial of the last plan with it
    num_cached_blocks: int = 0
    num_published_blocks: int = 0
    last_snapshot_boundary: int = 0  # the last boundary whose record was considered
    snapshots: list[bytes] = field(default_factory=list)  # names of the records it made
    decode_snapshot: bytes | None = None  # the record that moves along with decoding
    pending_prefix_hash: bytes | None = None  # the record that its prefill will leave

    @property
    def max_len(self) -> int:
        return len(self.prompt) + self.max_tokens

    @property
    def is_replay(self) -> bool:
        """Whether its next token came once before, in an earlier life."""
        return len(self.tokens) < self.max_len_reached

    @property
    def position(self) -> int:
        """Tokens behind it when all plans under way are done, if each decode step adds one."""
        return max(self.num_computed_tokens, self.num_scheduled_tokens) + self.num_inflight_decodes


class PrefillChunk(NamedTuple):
    """Read tokens[start : start + count]; at start 0 the slot's record is to be emptied first. last: then sample."""

    request: Request
    start: int
    count: int
    last: bool


class DecodeRow(NamedTuple):
    """Add a token, or several. position: of the token to be fed; with lookahead, the least that it may be."""

    request: Request
    position: int


@dataclass(frozen=True, eq=False)
class SchedulerOutput:
    """One call of the device: copy records (from, to; none is both), then prefill and decode, in any order.

    The tables are to be made of `Request.pages` before the scheduler is called again.
    """

    step_id: int
    copies: tuple[tuple[int, int], ...]
    prefill: PrefillChunk | None
    decode: tuple[DecodeRow, ...]

    @property
    def requests(self) -> list[Request]:
        return [row.request for row in (self.prefill, *self.decode) if row is not None]
