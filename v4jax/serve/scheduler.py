"""Which sequences run next: continuous batching as a state machine over `cache.Blocks`, without any device.

`step` plans one call of the device, `commit` tells what came of it. First come, first served: the waiting sequence
that arrived first is admitted when a slot is free and pages for its tokens and one block more can be had; one sequence
reads its prompt at a time, a chunk a step, while all others decode. When pages run out, the sequence that arrived last
gives its pages up (what it published stays findable until evicted) and waits again, before all that came later; it then
reads its prompt and the tokens that it had as one prompt. The oldest is never made to wait by a younger one, and what
does not fit alone is refused at `add`, so everything ends.

**Replay.** Reading a token as part of a prompt and decoding it differ in the last bits. Where that matters, `replay`
makes a preempted sequence decode its tokens anew (`Sequence.repeats` says that the next one is known already), and
shares no block that decoding wrote.

**One step ahead.** `step` may be called once before the last plan is committed; plans run and are committed in order.
A plan is made from lengths, not from the values of tokens: `Sequence.ahead` counts the decode steps under way, each of
which adds 1 to 1 + lookahead tokens, so a sequence's position lies in a known range. Three rules make that safe:

* Pages are allocated for the upper end of the range (never beyond what max_tokens allows; the device must write rows
  that have no page to page 0), records are copied at the lower end.
* What ends or is preempted while a plan with it is under way keeps its pages and its slot until that plan is
  committed (`_leaving`): nothing that the device may still write is given to others. Preempted sequences keep the
  tokens which that commit brings. While something is leaving, nobody else is preempted: room is on its way.
* A block is published, and a record made findable, when the plan that wrote it is committed and its sequence has not
  failed. So what is found has been computed from tokens that are known, and was judged by the engine.

**Failure.** `fail` is to be called before the commit of the plan that showed it. It makes unfindable everything that
the sequence computed or kept in this life, blocks of its prompt too; blocks that it had found stay, as others vouched
for them. Tokens that a failed or cancelled sequence still gains are ignored.

**Records.** A record is kept at the last block boundary before a prompt's end, if asked every so many blocks, and at
the last boundary that decoding has passed; of the latter a sequence has only the newest, unless others resumed from the
older ones. With lookahead, a copy may be taken when up to `slack` tokens behind the boundary have been written,
rejected ones included: a record's rings must reach so far back, as they must `lookahead` for undoing rejected tokens.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Collection, Hashable, Mapping
from collections.abc import Sequence as Tokens

from v4jax.cache import prefix
from v4jax.cache.blocks import Blocks
from v4jax.core.check import UserError
from v4jax.serve.sequence import Decode, Plan, Prefill, Sequence, State

_AHEAD = 2  # waiting sequences whose blocks are fetched from the tiers below the device
_LIVE = (State.PREFILL, State.RUNNING, State.PREEMPTED)


class _Draft:
    """A plan in the making, and what its commit has to settle: copies out of records, and into them."""

    def __init__(self, serial: int):
        self.serial = serial
        self.copies: list[tuple[int, int]] = []
        self.sources: list[int] = []
        self.targets: list[tuple[Sequence, bytes, int]] = []
        self.plan: Plan | None = None


class Scheduler:
    """Sequences on `slots` records 1 to slots, over the pages and kept records of `blocks`.

    block_tokens: tokens of a block. prefill_chunk: most tokens of one prompt in a plan; chunks end at its multiples,
    and at the last block boundary before the prompt's end. record_every: blocks between further records (0: none).
    lookahead: tokens that a decode step may add beyond one. slack: tokens behind its boundary that a record may hold.
    replay: see above.
    """

    def __init__(
        self,
        blocks: Blocks,
        slots: int,
        block_tokens: int,
        prefill_chunk: int,
        *,
        record_every: int = 0,
        lookahead: int = 0,
        slack: int | None = None,
        replay: bool = False,
    ):
        self.blocks, self.block, self.chunk = blocks, block_tokens, prefill_chunk
        self.record_every, self.lookahead, self.replay = record_every, lookahead, replay
        self.slack = 2 * lookahead if slack is None else slack
        self.sequences: dict[Hashable, Sequence] = {}  # all that hold anything or wait
        self._waiting: list[Sequence] = []  # by arrival, and all arrived after all active ones
        self._active: list[Sequence] = []  # by arrival
        self._leaving: list[Sequence] = []
        self._most_slots, self._slots = slots, list(range(slots, 0, -1))
        self._flight: deque[_Draft] = deque()
        self._serial = self._committed = self._preemptions = 0
        self._drafts = self._accepted = 0  # decode steps of requests, and tokens drafted that they accepted
        self.arrivals = 0  # requests so far
        self.below = None  # a `serve.bay.Bay`, if there are tiers below the device

    def reset(self) -> None:
        """Drop all requests and all that the blocks hold, whatever state an exception left them in; counts stay."""
        self.blocks.reset()
        self.sequences, self._waiting, self._active, self._leaving = {}, [], [], []
        self._slots = list(range(self._most_slots, 0, -1))
        self._flight, self._committed = deque(), self._serial

    # --- what users of a request do --------------------------------------------------------------------------------

    def add(self, id: Hashable, prompt: Tokens[int], max_tokens: int, *, seed: bytes | None = None) -> Sequence:
        """Queue a request. seed: of the names of its blocks (`prefix.seed`), None: it shares and leaves nothing.

        Raises UserError if the pool could not hold it even alone.
        """
        if id in self.sequences or not prompt or max_tokens < 1:
            raise ValueError(f"request {id!r} is in use, has no prompt or is to add no tokens")
        self.check_fits(len(prompt), max_tokens)
        self.arrivals += 1
        sequence = Sequence(id, tuple(prompt), max_tokens, seed, self.arrivals, list(prompt))
        self.sequences[id] = sequence
        self._waiting.append(sequence)
        return sequence

    def check_fits(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raise UserError if the pool could not hold such a request even alone."""
        need, most = self._pages(prompt_tokens + max_tokens - 1 + self.lookahead), self.blocks.capacity
        if need > most:
            raise UserError(
                f"a prompt of {prompt_tokens} tokens with max_tokens {max_tokens} needs {need} pages of {self.block} "
                f"tokens, but the cache has {most}; shorten one of them or give the cache more memory"
            )

    def finish(self, id: Hashable) -> bool:
        """End a request whose text is complete before max_tokens; False if it has ended already."""
        return self._stop(id, State.FINISHED)

    def cancel(self, id: Hashable) -> bool:
        """End a request at any moment; False if it has ended already."""
        return self._stop(id, State.CANCELLED)

    def fail(self, id: Hashable) -> bool:
        """End a request whose results are not to be trusted, see above; False if it has ended already."""
        return self._stop(id, State.FAILED)

    def _stop(self, id: Hashable, state: State) -> bool:
        sequence = self.sequences.get(id)
        if sequence is None or sequence.state not in (*_LIVE, State.WAITING):
            return False
        if state is State.FAILED:
            self.blocks.retract(sequence.pages[sequence.found :])
            for name in sequence.kept:
                self.blocks.forget(name)
        self._leave(sequence, state)
        return True

    # --- planning --------------------------------------------------------------------------------------------------

    def step(self) -> Plan | None:
        """What to run next; None if there is nothing (then commit what is under way, or add requests)."""
        if len(self._flight) > 1:
            raise RuntimeError("two plans are under way; commit the older one first")
        if self.below is not None:
            for sequence in self._waiting[:_AHEAD]:
                self.below.prepare(sequence, self._usable(sequence))
        draft = _Draft(self._serial + 1)
        decode, short = self._decode(draft)
        short = short or any(sequence.state is State.PREEMPTED for sequence in self._leaving)
        prefill = self._prefill(draft, admit=not short)
        if not decode and prefill is None:
            return None
        self._serial = draft.serial
        draft.plan = Plan(draft.serial, tuple(draft.copies), prefill, tuple(decode))
        for sequence in draft.plan.sequences:
            sequence.last = draft.serial
        self._flight.append(draft)
        return draft.plan

    def _decode(self, draft: _Draft) -> tuple[list[Decode], bool]:
        """Rows to decode, and whether one had to be left out for want of pages: then no younger one gets any."""
        rows, short = [], False
        for sequence in list(self._active):
            position, limit = sequence.position, sequence.limit
            if sequence.state is not State.RUNNING or position + 1 >= limit:
                continue  # preempted just now, or what is under way reaches max_tokens
            most = position + sequence.ahead * self.lookahead
            need = self._pages(min(most + 1, limit - 1) + self.lookahead) - len(sequence.pages)
            if need > 0:
                short = short or not self._grow(sequence, need)
                if short:
                    continue
            boundary = position // self.block * self.block
            written = most if sequence.ahead else most + self.lookahead  # rejected tokens of the last step
            if boundary > sequence.copied and written - boundary <= self.slack:
                self._keep(sequence, boundary, draft)
            rows.append(Decode(sequence, position))
            sequence.ahead += 1
        return rows, short

    def _grow(self, sequence: Sequence, need: int) -> bool:
        """Give it `need` more pages, at the cost of the youngest; False if it has to wait for them or was preempted."""
        while (pages := self.blocks.allocate(need)) is None:
            if self._leaving:
                return False
            youngest = self._active[-1]
            youngest.preemptions += 1
            self._preemptions += 1
            self._leave(youngest, State.PREEMPTED)
            if youngest is sequence:
                return False
        sequence.pages += pages
        return True

    def _prefill(self, draft: _Draft, admit: bool) -> Prefill | None:
        """The next chunk of the one prompt that is being read; admit: otherwise of the first in the queue."""
        sequence = next((s for s in self._active if s.state is State.PREFILL), None)
        if sequence is None:
            sequence = self._admit(draft) if admit and self._waiting and self._slots else None
        if sequence is None:
            return None
        start, goal = sequence.sent, sequence.goal
        boundary = (goal - 1) // self.block * self.block
        period = self.record_every * self.block or goal
        if start > sequence.copied and (start == boundary or start % period == 0):
            self._keep(sequence, start, draft)
        ends = [start // size * size + size for size in (self.chunk, period)]
        sequence.sent = end = min([goal, *ends, *([boundary] if boundary > start else [])])
        if end == goal:
            sequence.state = State.RUNNING
        return Prefill(sequence, start, end - start, last=end == goal)

    def _admit(self, draft: _Draft) -> Sequence | None:
        """Give the first in the queue a slot, what is known of its blocks, and pages; None if it has to wait."""
        sequence = self._waiting[0]
        usable = self._usable(sequence)
        found, record = self.blocks.match(usable)
        promised = {other.promise for other in self._active}
        if not promised.isdisjoint(usable[found:]):
            return None  # somebody is computing what it could begin with
        need = self._pages(len(sequence.tokens)) - found
        spare = self._pages(max(len(sequence.tokens), sequence.reached) + self.block) - found
        most = self._pages(sequence.limit - 1 + self.lookahead) - found
        if self.blocks.room(usable[:found]) < min(spare, most):
            return None
        if self.below is not None:
            if self.below.awaits(sequence, usable):
                return None
            found, record = self.blocks.match(usable)
            need = self._pages(len(sequence.tokens)) - found
        if not sequence.preemptions:
            self.blocks.note(usable, found)
        sequence.pages = self.blocks.acquire(usable[:found]) + self.blocks.allocate(need)
        sequence.slot, sequence.goal, sequence.state = self._slots.pop(), len(sequence.tokens), State.PREFILL
        sequence.found = sequence.published = found
        sequence.computed = sequence.sent = sequence.copied = found * self.block
        if record is not None:
            draft.sources.append(self.blocks.pin(usable[found - 1]))
            draft.copies.append((record, sequence.slot))
        sequence.promise = usable[-1] if found < len(usable) else None
        self._active.append(self._waiting.pop(0))
        return sequence

    def _keep(self, sequence: Sequence, boundary: int, draft: _Draft) -> None:
        """Copy the slot into a record for `boundary`, where the slot stands now (or not more than `slack` behind)."""
        sequence.copied = boundary
        if sequence.seed is None or boundary > self._shared(sequence):
            return
        name = self._names(sequence)[boundary // self.block - 1]
        if boundary > len(sequence.prompt):
            if sequence.moving is not None:
                self.blocks.forget(sequence.moving, unless_used=True)
            sequence.moving = None
        record = self.blocks.keep(name)
        if record is None:
            return
        if boundary > len(sequence.prompt):
            sequence.moving = name
        sequence.kept.append(name)
        draft.copies.append((sequence.slot, record))
        draft.targets.append((sequence, name, record))

    # --- committing ------------------------------------------------------------------------------------------------

    def commit(self, plan: Plan, gained: Mapping[Hashable, Tokens[int]], finished: Collection[Hashable] = ()) -> None:
        """Take the results of the oldest plan under way.

        gained: the new tokens of every sequence that decoded or read the last of its prompt, by id; a sequence that
        ended meanwhile may be left out. Tokens beyond max_tokens are dropped, and reaching it finishes the sequence.
        finished: ids that end here for another reason; their tokens are to be cut where they end.
        """
        if not self._flight or self._flight[0].plan is not plan:
            raise ValueError("plans are committed once, in the order in which they were made")
        draft = self._flight.popleft()
        for sequence in plan.sequences:
            if sequence.state in _LIVE:
                self._gain(sequence, plan, gained.get(sequence.id, ()))
                if sequence.id in finished or len(sequence.tokens) >= sequence.limit:
                    self._leave(sequence, State.FINISHED)
        for record in draft.sources:
            self.blocks.unpin(record)
        for sequence, name, record in draft.targets:
            judged = sequence.state not in (State.CANCELLED, State.FAILED)
            self.blocks.ready(name, record, valid=judged)
        self._committed = plan.serial
        for sequence in [s for s in self._leaving if s.last <= self._committed]:
            self._leaving.remove(sequence)
            self._settle(sequence)

    def _gain(self, sequence: Sequence, plan: Plan, tokens: Tokens[int]) -> None:
        """Add what one plan brought, and publish the blocks that it filled."""
        accepted = len(tokens) - 1  # by the model, whether or not max_tokens has room for them
        tokens = list(tokens)[: sequence.limit - len(sequence.tokens)]
        if plan.prefill is not None and plan.prefill.sequence is sequence:
            sequence.computed = plan.prefill.start + plan.prefill.count
            if plan.prefill.last:
                sequence.promise = None
            least = most = int(plan.prefill.last)
        else:
            sequence.computed += len(tokens)
            sequence.ahead -= 1
            self._drafts, self._accepted = self._drafts + 1, self._accepted + accepted
            least, most = 1, 1 + self.lookahead
        if not least <= len(tokens) <= most:
            raise ValueError(f"request {sequence.id!r} gained {len(tokens)} tokens, where {least} to {most} can be")
        sequence.tokens += tokens
        full = min(sequence.computed, self._shared(sequence)) // self.block
        if sequence.seed is not None and full > sequence.published:
            names = self._names(sequence)
            for i in range(sequence.published, full):
                self.blocks.publish(names[i - 1] if i else sequence.seed, names[i], sequence.pages[i])
            sequence.published = full

    def _leave(self, sequence: Sequence, state: State) -> None:
        """End or preempt; what it holds is let go when no plan with it is under way any more."""
        before, sequence.state = sequence.state, state
        if before is State.PREEMPTED:
            return  # it is leaving already
        (self._waiting if before is State.WAITING else self._active).remove(sequence)
        if sequence.last > self._committed:
            self._leaving.append(sequence)
        else:
            self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """Let go of everything; a preempted sequence waits again, at its place by arrival."""
        self.blocks.release(sequence.pages)
        if sequence.slot:
            self._slots.append(sequence.slot)
        sequence.pages, sequence.kept, sequence.slot = [], [], 0
        if sequence.state is not State.PREEMPTED:
            del self.sequences[sequence.id]
            return
        if self.replay:
            sequence.reached = max(sequence.reached, len(sequence.tokens))
            del sequence.tokens[len(sequence.prompt) :]
        sequence.moving = sequence.promise = None
        sequence.goal = sequence.sent = sequence.computed = sequence.ahead = 0
        sequence.found = sequence.published = sequence.copied = 0
        sequence.state = State.WAITING
        bisect.insort(self._waiting, sequence, key=lambda s: s.arrival)

    # --- helpers, and what is seen from outside --------------------------------------------------------------------

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.block)

    def _shared(self, sequence: Sequence) -> int:
        """Tokens whose blocks others may find."""
        return len(sequence.prompt) if self.replay else sequence.limit

    def _usable(self, sequence: Sequence) -> list[bytes]:
        """Names of the blocks that it could begin behind; one token must be left to read."""
        return self._names(sequence)[: (len(sequence.tokens) - 1) // self.block]

    def _names(self, sequence: Sequence) -> list[bytes]:
        """Names of all blocks that its tokens fill; none if it does not take part in the prefix cache."""
        if sequence.seed is not None:
            parent, done = (sequence.names or [sequence.seed])[-1], len(sequence.names) * self.block
            if len(sequence.tokens) - done >= self.block:
                sequence.names += prefix.chain(parent, sequence.tokens[done:], self.block)
        return sequence.names

    @property
    def busy(self) -> bool:
        """Whether anything waits, runs or is to be committed."""
        return bool(self.sequences or self._flight)

    def stats(self) -> dict[str, float]:
        """Sequences now, preemptions since the start, and what the blocks count."""
        counts = {"waiting": len(self._waiting), "running": len(self._active), "preemptions": self._preemptions}
        if self.lookahead:
            counts |= {
                "spec_decode_num_drafts": self._drafts,
                "spec_decode_num_draft_tokens": self._drafts * self.lookahead,
                "spec_decode_num_accepted_tokens": self._accepted,
            }
        return counts | self.blocks.stats()

    def check(self) -> None:
        """Raise AssertionError if any book does not add up."""
        self.blocks.check([sequence.pages for sequence in self.sequences.values()])
        arrivals = [sequence.arrival for sequence in (*self._active, *self._waiting)]
        slots = [sequence.slot for sequence in (*self._active, *self._leaving)]
        for rule, holds in {
            "sequences are in order of arrival, active ones before waiting ones": arrivals == sorted(arrivals),
            "every slot is free or one sequence's": len({*self._slots, *slots}) == len(self._slots) + len(slots),
            "slots are held by the active and the leaving only": all(slots) and not any(s.slot for s in self._waiting),
            "no sequence is lost": len(arrivals) + len(self._leaving) == len(self.sequences),
            "one prompt is read at a time": sum(s.state is State.PREFILL for s in self._active) <= 1,
        }.items():
            if not holds:
                raise AssertionError(f"the scheduler's books are wrong; the rule: {rule}")
