"""What the scheduler and the engine say to each other: sequences, and plans of what to run next."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple


class State(enum.Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"  # all of its prompt has been sent to the device
    PREEMPTED = "preempted"  # leaves its slot when the plans under way are committed, then waits
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(eq=False)
class Sequence:
    """One request. The engine reads `tokens`, `pages` (of block 0 on) and `slot` (its record, 0: none) and writes none.

    computed: tokens whose entries the committed plans have written. sent: tokens that prefill has sent to the device.
    goal: tokens to prefill in this life, which began with admission and ends with preemption. found: blocks that it
    began behind.
    """

    id: Hashable
    prompt: tuple[int, ...]
    max_tokens: int
    seed: bytes | None
    arrival: int
    tokens: list[int]
    state: State = State.WAITING
    preemptions: int = 0
    names: list[bytes] = field(default_factory=list)  # of full blocks; grows with the tokens
    reached: int = 0  # most tokens that it had before a preemption that took some of them
    # The rest is of one life.
    pages: list[int] = field(default_factory=list)
    slot: int = 0
    goal: int = 0
    sent: int = 0
    computed: int = 0
    ahead: int = 0
    last: int = 0  # serial of the last plan with it
    found: int = 0
    published: int = 0
    copied: int = 0  # the last boundary whose record was considered
    kept: list[bytes] = field(default_factory=list)  # names of the records it made
    moving: bytes | None = None  # the record that moves along with decoding
    promise: bytes | None = None  # the record that its prefill will leave

    @property
    def limit(self) -> int:
        return len(self.prompt) + self.max_tokens

    @property
    def repeats(self) -> bool:
        """Whether its next token came once before, in an earlier life."""
        return len(self.tokens) < self.reached

    @property
    def position(self) -> int:
        """Tokens behind it when all plans under way are done, if each decode step adds one."""
        return max(self.computed, self.sent) + self.ahead


class Prefill(NamedTuple):
    """Read tokens[start : start + count]; at start 0 the slot's record is to be emptied first. last: then sample."""

    sequence: Sequence
    start: int
    count: int
    last: bool


class Decode(NamedTuple):
    """Add a token, or several. position: of the token to be fed; with lookahead, the least that it may be."""

    sequence: Sequence
    position: int


@dataclass(frozen=True, eq=False)
class Plan:
    """One call of the device: copy records (from, to; none is both), then prefill and decode, in any order.

    The tables are to be made of `Sequence.pages` before the scheduler is called again.
    """

    serial: int
    copies: tuple[tuple[int, int], ...]
    prefill: Prefill | None
    decode: tuple[Decode, ...]

    @property
    def sequences(self) -> list[Sequence]:
        return [row.sequence for row in (self.prefill, *self.decode) if row is not None]
