"""Which sequences run next: continuous batching as a state machine over `cache.BlockPool`, without any device.

`step` plans one call of the device, `commit` tells what came of it. First come, first served: the waiting sequence
that arrived first is admitted when a slot is free and pages for its tokens and one block more can be had; one sequence
reads its prompt at a time, a chunk a step, while all others decode. When pages run out, the sequence that arrived last
gives its pages up (what it published stays findable until evicted) and waits again, before all that came later; it then
reads its prompt and the tokens that it had as one prompt. The oldest is never made to wait by a younger one, and what
does not fit alone is refused at `add`, so everything ends.

**Replay.** Reading a token as part of a prompt and decoding it differ in the last bits. Where that matters, `replay`
makes a preempted sequence decode its tokens anew (`Request.repeats` says that the next one is known already), and
shares no block that decoding wrote.

**One step ahead.** `step` may be called once before the last plan is committed; plans run and are committed in order.
A plan is made from lengths, not from the values of tokens: `Request.ahead` counts the decode steps under way, each of
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

from v4jax.cache import block_hash
from v4jax.cache.block_pool import BlockPool
from v4jax.core.errors import UserError
from v4jax.serve.kv_connector import KVConnector
from v4jax.serve.request import DecodeRow, PrefillChunk, Request, RequestStatus, SchedulerOutput

_PREFETCH_REQUESTS = 2  # waiting sequences whose blocks are fetched from the tiers below the device
_LIVE = (RequestStatus.PREFILL, RequestStatus.RUNNING, RequestStatus.PREEMPTED)


class PendingOutput:
    """A plan in the making, and what its commit has to settle: copies out of records, and into them."""

    def __init__(self, serial: int):
        self.serial = serial
        self.copies: list[tuple[int, int]] = []
        self.sources: list[int] = []
        self.targets: list[tuple[Request, bytes, int]] = []
        self.plan: SchedulerOutput | None = None


class Scheduler:
    """Sequences on `slots` records 1 to slots, over the pages and kept records of `blocks`.

    block_tokens: tokens of a block. max_num_batched_tokens: most tokens of one prompt in a plan; chunks end at its multiples,
    and at the last block boundary before the prompt's end. snapshot_interval_blocks: blocks between further records (0: none).
    lookahead: tokens that a decode step may add beyond one. slack: tokens behind its boundary that a record may hold.
    replay: see above. kv_connector: of the tiers below the device; None without tiers.
    """

    def __init__(
        self,
        blocks: BlockPool,
        slots: int,
        block_tokens: int,
        max_num_batched_tokens: int,
        *,
        snapshot_interval_blocks: int = 0,
        lookahead: int = 0,
        slack: int | None = None,
        replay: bool = False,
        kv_connector: KVConnector | None = None,
    ):
        self.block_pool, self.block_size, self.max_num_batched_tokens = blocks, block_tokens, max_num_batched_tokens
        self.snapshot_interval_blocks, self.num_lookahead_tokens, self.deterministic_replay = (
            snapshot_interval_blocks,
            lookahead,
            replay,
        )
        self.rollback_tokens = 2 * lookahead if slack is None else slack
        self.requests: dict[Hashable, Request] = {}  # all that hold anything or wait
        self._waiting: list[Request] = []  # by arrival, and all arrived after all active ones
        self._active: list[Request] = []  # by arrival
        self._retiring: list[Request] = []
        self._most_slots, self._slots = slots, list(range(slots, 0, -1))
        self._inflight: deque[PendingOutput] = deque()
        self._step_id = self._committed = self._preemptions = 0
        self._drafts = self._accepted = 0  # decode steps of requests, and tokens drafted that they accepted
        self.arrivals = 0  # requests so far
        self.kv_connector = kv_connector
        if kv_connector is not None:
            kv_connector.bind(blocks)

    def reset(self) -> None:
        """Drop all requests and all that the blocks hold, whatever state an exception left them in; counts stay."""
        self.block_pool.reset()
        if self.kv_connector is not None:
            self.kv_connector.bind(self.block_pool)
        self.requests, self._waiting, self._active, self._retiring = {}, [], [], []
        self._slots = list(range(self._most_slots, 0, -1))
        self._inflight, self._committed = deque(), self._step_id

    # --- what users of a request do --------------------------------------------------------------------------------

    def add_request(self, id: Hashable, prompt: Tokens[int], max_tokens: int, *, seed: bytes | None = None) -> Request:
        """Queue a request. seed: of the names of its blocks (`prefix.seed`), None: it shares and leaves nothing.

        Raises UserError if the pool could not hold it even alone.
        """
        if id in self.requests or not prompt or max_tokens < 1:
            raise ValueError(f"request {id!r} is in use, has no prompt or is to add no tokens")
        self.check_fits(len(prompt), max_tokens)
        self.arrivals += 1
        sequence = Request(id, tuple(prompt), max_tokens, seed, self.arrivals, list(prompt))
        self.requests[id] = sequence
        self._waiting.append(sequence)
        return sequence

    def check_fits(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raise UserError if the pool could not hold such a request even alone."""
        need, most = self._pages(prompt_tokens + max_tokens - 1 + self.num_lookahead_tokens), self.block_pool.capacity
        if need > most:
            raise UserError(
                f"a prompt of {prompt_tokens} tokens with max_tokens {max_tokens} needs {need} pages of {self.block_size} "
                f"tokens, but the cache has {most}; shorten one of them or give the cache more memory"
            )

    def finish_request(self, id: Hashable) -> bool:
        """End a request whose text is complete before max_tokens; False if it has ended already."""
        return self._stop(id, RequestStatus.FINISHED)

    def abort_request(self, id: Hashable) -> bool:
        """End a request at any moment; False if it has ended already."""
        return self._stop(id, RequestStatus.ABORTED)

    def fail_request(self, id: Hashable) -> bool:
        """End a request whose results are not to be trusted, see above; False if it has ended already."""
        return self._stop(id, RequestStatus.ERROR)

    def _stop(self, id: Hashable, state: RequestStatus) -> bool:
        sequence = self.requests.get(id)
        if sequence is None or sequence.status not in (*_LIVE, RequestStatus.WAITING):
            return False
        if state is RequestStatus.ERROR:
            self.block_pool.invalidate(sequence.block_ids[sequence.num_cached_blocks :])
            for name in sequence.snapshots:
                self.block_pool.drop_snapshot(name)
        self._retire(sequence, state)
        return True

    # --- planning --------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """What to run next; None if there is nothing (then commit what is under way, or add requests)."""
        if len(self._inflight) > 1:
            raise RuntimeError("two plans are under way; commit the older one first")
        if self.kv_connector is not None:
            for sequence in self._waiting[:_PREFETCH_REQUESTS]:
                self.kv_connector.prefetch(sequence, self._prefix_hashes(sequence))
        draft = PendingOutput(self._step_id + 1)
        decode, short = self._decode(draft)
        short = short or any(sequence.status is RequestStatus.PREEMPTED for sequence in self._retiring)
        prefill = self._prefill(draft, admit=not short)
        if not decode and prefill is None:
            return None
        self._step_id = draft.serial
        draft.plan = SchedulerOutput(draft.serial, tuple(draft.copies), prefill, tuple(decode))
        for sequence in draft.plan.requests:
            sequence.last_step = draft.serial
        self._inflight.append(draft)
        return draft.plan

    def _decode(self, draft: PendingOutput) -> tuple[list[DecodeRow], bool]:
        """Rows to decode, and whether one had to be left out for want of pages: then no younger one gets any."""
        rows, short = [], False
        for sequence in list(self._active):
            position, limit = sequence.position, sequence.max_len
            if sequence.status is not RequestStatus.RUNNING or position + 1 >= limit:
                continue  # preempted just now, or what is under way reaches max_tokens
            most = position + sequence.num_inflight_decodes * self.num_lookahead_tokens
            need = self._pages(min(most + 1, limit - 1) + self.num_lookahead_tokens) - len(sequence.block_ids)
            if need > 0:
                short = short or not self._allocate_slots(sequence, need)
                if short:
                    continue
            boundary = position // self.block_size * self.block_size
            written = (
                most if sequence.num_inflight_decodes else most + self.num_lookahead_tokens
            )  # rejected tokens of the last step
            if boundary > sequence.last_snapshot_boundary and written - boundary <= self.rollback_tokens:
                self._snapshot(sequence, boundary, draft)
            rows.append(DecodeRow(sequence, position))
            sequence.num_inflight_decodes += 1
        return rows, short

    def _allocate_slots(self, sequence: Request, need: int) -> bool:
        """Give it `need` more pages, at the cost of the youngest; False if it has to wait for them or was preempted."""
        while (pages := self.block_pool.allocate(need)) is None:
            if self._retiring:
                return False
            youngest = self._active[-1]
            youngest.preemptions += 1
            self._preemptions += 1
            self._retire(youngest, RequestStatus.PREEMPTED)
            if youngest is sequence:
                return False
        sequence.block_ids += pages
        return True

    def _prefill(self, draft: PendingOutput, admit: bool) -> PrefillChunk | None:
        """The next chunk of the one prompt that is being read; admit: otherwise of the first in the queue."""
        sequence = next((s for s in self._active if s.status is RequestStatus.PREFILL), None)
        if sequence is None:
            sequence = self._admit(draft) if admit and self._waiting and self._slots else None
        if sequence is None:
            return None
        start, goal = sequence.num_scheduled_tokens, sequence.num_prefill_tokens
        boundary = (goal - 1) // self.block_size * self.block_size
        period = self.snapshot_interval_blocks * self.block_size or goal
        if start > sequence.last_snapshot_boundary and (start == boundary or start % period == 0):
            self._snapshot(sequence, start, draft)
        ends = [start // size * size + size for size in (self.max_num_batched_tokens, period)]
        sequence.num_scheduled_tokens = end = min([goal, *ends, *([boundary] if boundary > start else [])])
        if end == goal:
            sequence.status = RequestStatus.RUNNING
        return PrefillChunk(sequence, start, end - start, last=end == goal)

    def _admit(self, draft: PendingOutput) -> Request | None:
        """Give the first in the queue a slot, what is known of its blocks, and pages; None if it has to wait."""
        sequence = self._waiting[0]
        usable = self._prefix_hashes(sequence)
        found, record = self.block_pool.match_prefix(usable)
        promised = {other.pending_prefix_hash for other in self._active}
        if not promised.isdisjoint(usable[found:]):
            return None  # somebody is computing what it could begin with
        need = self._pages(len(sequence.tokens)) - found
        spare = self._pages(max(len(sequence.tokens), sequence.max_len_reached) + self.block_size) - found
        most = self._pages(sequence.max_len - 1 + self.num_lookahead_tokens) - found
        if self.block_pool.num_available(usable[:found]) < min(spare, most):
            return None
        if self.kv_connector is not None:
            if self.kv_connector.is_loading(sequence) or not self.kv_connector.finish_load(sequence, usable):
                return None
            found, record = self.block_pool.match_prefix(usable)
            need = self._pages(len(sequence.tokens)) - found
        if not sequence.preemptions:
            self.block_pool.note(usable, found)
        sequence.block_ids = self.block_pool.touch(usable[:found]) + self.block_pool.allocate(need)
        sequence.state_slot, sequence.num_prefill_tokens, sequence.status = (
            self._slots.pop(),
            len(sequence.tokens),
            RequestStatus.PREFILL,
        )
        sequence.num_cached_blocks = sequence.num_published_blocks = found
        sequence.num_computed_tokens = sequence.num_scheduled_tokens = sequence.last_snapshot_boundary = (
            found * self.block_size
        )
        if record is not None:
            draft.sources.append(self.block_pool.pin(usable[found - 1]))
            draft.copies.append((record, sequence.state_slot))
        sequence.pending_prefix_hash = usable[-1] if found < len(usable) else None
        self._active.append(self._waiting.pop(0))
        return sequence

    def _snapshot(self, sequence: Request, boundary: int, draft: PendingOutput) -> None:
        """Copy the slot into a record for `boundary`, where the slot stands now (or not more than `slack` behind)."""
        sequence.last_snapshot_boundary = boundary
        if sequence.hash_seed is None or boundary > self._num_shareable_tokens(sequence):
            return
        name = self._block_hashes(sequence)[boundary // self.block_size - 1]
        if boundary > len(sequence.prompt):
            if sequence.decode_snapshot is not None:
                self.block_pool.drop_snapshot(sequence.decode_snapshot, unless_used=True)
            sequence.decode_snapshot = None
        record = self.block_pool.reserve_snapshot(name)
        if record is None:
            return
        if boundary > len(sequence.prompt):
            sequence.decode_snapshot = name
        sequence.snapshots.append(name)
        draft.copies.append((sequence.state_slot, record))
        draft.targets.append((sequence, name, record))

    # --- committing ------------------------------------------------------------------------------------------------

    def update_from_output(
        self, plan: SchedulerOutput, gained: Mapping[Hashable, Tokens[int]], finished: Collection[Hashable] = ()
    ) -> None:
        """Take the results of the oldest plan under way.

        gained: the new tokens of every sequence that decoded or read the last of its prompt, by id; a sequence that
        ended meanwhile may be left out. Tokens beyond max_tokens are dropped, and reaching it finishes the sequence.
        finished: ids that end here for another reason; their tokens are to be cut where they end.
        """
        if not self._inflight or self._inflight[0].plan is not plan:
            raise ValueError("plans are committed once, in the order in which they were made")
        draft = self._inflight.popleft()
        for sequence in plan.requests:
            if sequence.status in _LIVE:
                self._append_tokens(sequence, plan, gained.get(sequence.id, ()))
                if sequence.id in finished or len(sequence.tokens) >= sequence.max_len:
                    self._retire(sequence, RequestStatus.FINISHED)
        for record in draft.sources:
            self.block_pool.unpin(record)
        for sequence, name, record in draft.targets:
            judged = sequence.status not in (RequestStatus.ABORTED, RequestStatus.ERROR)
            self.block_pool.commit_snapshot(name, record, valid=judged)
        self._committed = plan.step_id
        for sequence in [s for s in self._retiring if s.last_step <= self._committed]:
            self._retiring.remove(sequence)
            self._free(sequence)

    def _append_tokens(self, sequence: Request, plan: SchedulerOutput, tokens: Tokens[int]) -> None:
        """Add what one plan brought, and publish the blocks that it filled."""
        accepted = len(tokens) - 1  # by the model, whether or not max_tokens has room for them
        tokens = list(tokens)[: sequence.max_len - len(sequence.tokens)]
        if plan.prefill is not None and plan.prefill.request is sequence:
            sequence.num_computed_tokens = plan.prefill.start + plan.prefill.count
            if plan.prefill.last:
                sequence.pending_prefix_hash = None
            least = most = int(plan.prefill.last)
        else:
            sequence.num_computed_tokens += len(tokens)
            sequence.num_inflight_decodes -= 1
            self._drafts, self._accepted = self._drafts + 1, self._accepted + accepted
            least, most = 1, 1 + self.num_lookahead_tokens
        if not least <= len(tokens) <= most:
            raise ValueError(f"request {sequence.id!r} gained {len(tokens)} tokens, where {least} to {most} can be")
        sequence.tokens += tokens
        full = min(sequence.num_computed_tokens, self._num_shareable_tokens(sequence)) // self.block_size
        if sequence.hash_seed is not None and full > sequence.num_published_blocks:
            names = self._block_hashes(sequence)
            for i in range(sequence.num_published_blocks, full):
                self.block_pool.cache_block(names[i - 1] if i else sequence.hash_seed, names[i], sequence.block_ids[i])
            sequence.num_published_blocks = full

    def _retire(self, sequence: Request, state: RequestStatus) -> None:
        """End or preempt; what it holds is let go when no plan with it is under way any more."""
        before, sequence.status = sequence.status, state
        if before is RequestStatus.PREEMPTED:
            return  # it is leaving already
        (self._waiting if before is RequestStatus.WAITING else self._active).remove(sequence)
        if sequence.last_step > self._committed:
            self._retiring.append(sequence)
        else:
            self._free(sequence)

    def _free(self, sequence: Request) -> None:
        """Let go of everything; a preempted sequence waits again, at its place by arrival."""
        self.block_pool.free(sequence.block_ids)
        if sequence.state_slot:
            self._slots.append(sequence.state_slot)
        sequence.block_ids, sequence.snapshots, sequence.state_slot = [], [], 0
        if sequence.status is not RequestStatus.PREEMPTED:
            del self.requests[sequence.id]
            return
        if self.deterministic_replay:
            sequence.max_len_reached = max(sequence.max_len_reached, len(sequence.tokens))
            del sequence.tokens[len(sequence.prompt) :]
        sequence.decode_snapshot = sequence.pending_prefix_hash = None
        sequence.num_prefill_tokens = sequence.num_scheduled_tokens = sequence.num_computed_tokens = (
            sequence.num_inflight_decodes
        ) = 0
        sequence.num_cached_blocks = sequence.num_published_blocks = sequence.last_snapshot_boundary = 0
        sequence.status = RequestStatus.WAITING
        bisect.insort(self._waiting, sequence, key=lambda s: s.arrival)

    # --- helpers, and what is seen from outside --------------------------------------------------------------------

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _num_shareable_tokens(self, sequence: Request) -> int:
        """Tokens whose blocks others may find."""
        return len(sequence.prompt) if self.deterministic_replay else sequence.max_len

    def _prefix_hashes(self, sequence: Request) -> list[bytes]:
        """Names of the blocks that it could begin behind; one token must be left to read."""
        return self._block_hashes(sequence)[: (len(sequence.tokens) - 1) // self.block_size]

    def _block_hashes(self, sequence: Request) -> list[bytes]:
        """Names of all blocks that its tokens fill; none if it does not take part in the prefix cache."""
        if sequence.hash_seed is not None:
            parent, done = (
                (sequence.block_hashes or [sequence.hash_seed])[-1],
                len(sequence.block_hashes) * self.block_size,
            )
            if len(sequence.tokens) - done >= self.block_size:
                sequence.block_hashes += block_hash.block_hashes(parent, sequence.tokens[done:], self.block_size)
        return sequence.block_hashes

    @property
    def busy(self) -> bool:
        """Whether anything waits, runs or is to be committed."""
        return bool(self.requests or self._inflight)

    def stats(self) -> dict[str, float]:
        """Sequences now, preemptions since the start, and what the blocks count."""
        counts = {"waiting": len(self._waiting), "running": len(self._active), "preemptions": self._preemptions}
        if self.num_lookahead_tokens:
            counts |= {
                "spec_decode_num_drafts": self._drafts,
                "spec_decode_num_draft_tokens": self._drafts * self.num_lookahead_tokens,
                "spec_decode_num_accepted_tokens": self._accepted,
            }
        return counts | self.block_pool.stats()

    def check_invariants(self) -> None:
        """Raise AssertionError if any book does not add up."""
        self.block_pool.check_invariants([sequence.block_ids for sequence in self.requests.values()])
        arrivals = [sequence.arrival for sequence in (*self._active, *self._waiting)]
        slots = [sequence.state_slot for sequence in (*self._active, *self._retiring)]
        for rule, holds in {
            "sequences are in order of arrival, active ones before waiting ones": arrivals == sorted(arrivals),
            "every slot is free or one sequence's": len({*self._slots, *slots}) == len(self._slots) + len(slots),
            "slots are held by the active and the leaving only": all(slots)
            and not any(s.state_slot for s in self._waiting),
            "no sequence is lost": len(arrivals) + len(self._retiring) == len(self.requests),
            "one prompt is read at a time": sum(s.status is RequestStatus.PREFILL for s in self._active) <= 1,
        }.items():
            if not holds:
                raise AssertionError(f"the scheduler's books are wrong; the rule: {rule}")
