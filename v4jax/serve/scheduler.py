"""Continuous-batching scheduler: a state machine over `cache.block_pool.BlockPool` that touches no device.

`schedule` plans one step of the device; `update_from_output` commits its results. Requests are served in the order of
their `Request.rank`: by priority, and first come, first served among equals; "older" means earlier in this order. The
first waiting request is admitted when a state slot is free and the pool can give blocks for its tokens plus one
block. One request prefills at a time, one chunk per step, while all others decode. When blocks run out, the youngest
request is preempted: it frees its blocks (published ones stay findable until evicted) and waits again, ahead of
younger ones. On readmission it prefills its prompt and its generated tokens as one prompt. A running request never
waits for a younger one, and `add_request` refuses what does not fit alone, so every request ends.

**Deterministic replay.** Prefill and decode of the same token differ in the last bits. Where bits matter,
`deterministic_replay` makes a preempted request decode its tokens again (`Request.is_replay`: the next token
is already known), and no block written by decoding is shared.

**Async scheduling.** `schedule` may be called once before the last plan is committed. Plans run and are committed in
order. A plan depends on lengths, not on token values: `Request.num_inflight_decodes` counts uncommitted decode steps,
each of which adds 1 to 1 + num_lookahead_tokens tokens, so a request's position is in a known range. Three rules
make that safe:

* Blocks are allocated for the upper end of the range, but never beyond max_tokens; the device must write rows that have
  no block to block 0. State slots are copied at the lower end.
* A request that ends or is preempted while a plan with it is in flight keeps its blocks and its slot until that plan
  is committed (`_retiring`), so nothing that the device may still write is given to others. A preempted request keeps
  the tokens of that commit. While a request is retiring, no other is preempted, because blocks will soon be free.
* A block or a state snapshot becomes findable when the plan that wrote it is committed and its request has not failed.
  Every findable block was therefore computed from known tokens and checked by the engine.

**Failure.** Call `fail_request` before the commit of the plan that showed the failure. It makes unfindable every block
and snapshot that the request computed in its current run, prompt blocks included. Blocks that it took from the prefix
cache stay, because other requests computed them. Later tokens of a failed or aborted request are ignored.

**State snapshots.** A snapshot is kept at the last block boundary before a prompt's end, every
`snapshot_interval_blocks` blocks if asked for, and at the last boundary that decoding has passed. Of the decode
snapshots, a request keeps only the newest and those from which others resumed. With lookahead, a snapshot may be
copied when up to `rollback_tokens` tokens past its boundary have been written, rejected ones included. Its window
rings must reach that far back, as they must reach `num_lookahead_tokens` back to undo rejected tokens.
"""

from __future__ import annotations

import bisect
import operator
from collections import deque
from collections.abc import Collection, Hashable, Mapping, Sequence

from v4jax.cache import block_hash
from v4jax.cache.block_pool import BlockPool
from v4jax.core.errors import UserError
from v4jax.serve.kv_connector import KVConnector
from v4jax.serve.request import DecodeRow, PrefillChunk, Request, RequestStatus, SchedulerOutput

_PREFETCH_REQUESTS = 2  # waiting requests whose blocks are prefetched from the offload tiers
_LIVE = (RequestStatus.PREFILL, RequestStatus.RUNNING, RequestStatus.PREEMPTED)
_rank = operator.attrgetter("rank")


class PendingOutput:
    """A plan being built, and the snapshot copies (sources and targets) that its commit finalizes."""

    def __init__(self, serial: int):
        self.serial = serial
        self.copies: list[tuple[int, int]] = []
        self.sources: list[int] = []
        self.targets: list[tuple[Request, bytes, int]] = []
        self.plan: SchedulerOutput | None = None


class Scheduler:
    """Schedules requests onto state slots and KV blocks of one device.

    Args:
        blocks: the pool of KV blocks and state snapshots.
        slots: number of state slots; their ids are 1 to `slots`.
        block_tokens: tokens per block.
        max_num_batched_tokens: maximum prompt tokens per plan. Chunks end at its multiples and at the last block
            boundary before the prompt's end.
        snapshot_interval_blocks: blocks between additional prompt snapshots; 0 takes none.
        lookahead: tokens that a decode step may add beyond one.
        slack: tokens past its boundary that a snapshot may hold; None means 2 * lookahead.
        replay: deterministic replay, see the module docstring.
        kv_connector: connector to the offload tiers; None without tiers.
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
        self.block_pool = blocks
        self.block_size = block_tokens
        self.max_num_batched_tokens = max_num_batched_tokens
        self.snapshot_interval_blocks = snapshot_interval_blocks
        self.num_lookahead_tokens = lookahead
        self.deterministic_replay = replay
        self.rollback_tokens = 2 * lookahead if slack is None else slack
        self.requests: dict[Hashable, Request] = {}  # every request that waits or holds resources
        self._waiting: list[Request] = []  # by rank; each is younger than every active request of its priority
        self._active: list[Request] = []  # by rank
        self._retiring: list[Request] = []
        self._most_slots, self._slots = slots, list(range(slots, 0, -1))
        self._inflight: deque[PendingOutput] = deque()
        self._step_id = self._committed = self._preemptions = 0
        self._drafts = self._accepted = 0  # decode steps of requests, and accepted draft tokens
        self.arrivals = 0  # requests added so far
        self.kv_connector = kv_connector
        if kv_connector is not None:
            kv_connector.bind(blocks)

    def reset(self) -> None:
        """Drop all requests and the pool's contents, whatever state an exception left; counters stay."""
        self.block_pool.reset()
        if self.kv_connector is not None:
            self.kv_connector.bind(self.block_pool)
        self.requests, self._waiting, self._active, self._retiring = {}, [], [], []
        self._slots = list(range(self._most_slots, 0, -1))
        self._inflight, self._committed = deque(), self._step_id

    # --- requests --------------------------------------------------------------------------------------------------

    def add_request(
        self,
        id: Hashable,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        seed: bytes | None = None,
        extra_keys: Sequence[block_hash.ExtraKey] = (),
        priority: int = 0,
    ) -> Request:
        """Queue a request.

        Args:
            id: unique among the current requests.
            prompt: token ids, at least one.
            max_tokens: maximum new tokens, at least 1.
            seed: seed of its block hashes (`block_hash.hash_seed`); None excludes it from the prefix cache.
            extra_keys: extra keys of its block hashes.
            priority: requests with lower numbers are served first.

        Raises:
            UserError: the pool could not hold the request even alone.
            ValueError: the id is in use, the prompt is empty or max_tokens is below 1.
        """
        if id in self.requests or not prompt or max_tokens < 1:
            raise ValueError(f"request {id!r} is in use, has no prompt or is to add no tokens")
        self.check_fits(len(prompt), max_tokens)
        self.arrivals += 1
        request = Request(id, tuple(prompt), max_tokens, seed, self.arrivals, list(prompt), tuple(extra_keys), priority)
        self.requests[id] = request
        bisect.insort(self._waiting, request, key=_rank)
        return request

    def check_fits(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raise UserError if the pool could not hold such a request even alone."""
        need, most = self._pages(prompt_tokens + max_tokens - 1 + self.num_lookahead_tokens), self.block_pool.capacity
        if need > most:
            raise UserError(
                f"a prompt of {prompt_tokens} tokens with max_tokens {max_tokens} needs {need} pages of "
                f"{self.block_size} tokens, but the cache has {most}; shorten one of them or give the cache more memory"
            )

    def finish_request(self, id: Hashable) -> bool:
        """End a request whose text is complete before max_tokens; False if it has ended already."""
        return self._stop(id, RequestStatus.FINISHED)

    def abort_request(self, id: Hashable) -> bool:
        """End a request at any moment; False if it has ended already."""
        return self._stop(id, RequestStatus.ABORTED)

    def fail_request(self, id: Hashable) -> bool:
        """End a request with invalid results (see **Failure** above); False if it has ended already."""
        return self._stop(id, RequestStatus.ERROR)

    def _stop(self, id: Hashable, state: RequestStatus) -> bool:
        request = self.requests.get(id)
        if request is None or request.status not in (*_LIVE, RequestStatus.WAITING):
            return False
        if state is RequestStatus.ERROR:
            self.block_pool.invalidate(request.block_ids[request.num_cached_blocks :])
            for name in request.snapshots:
                self.block_pool.drop_snapshot(name)
        self._retire(request, state)
        return True

    # --- planning --------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        """Plan the next step; None if nothing can run (commit the plan in flight, or add requests)."""
        if len(self._inflight) > 1:
            raise RuntimeError("two plans are under way; commit the older one first")
        if self.kv_connector is not None:
            for request in self._waiting[:_PREFETCH_REQUESTS]:
                self.kv_connector.prefetch(request, self._prefix_hashes(request))
        pending = PendingOutput(self._step_id + 1)
        decode, short = self._decode(pending)
        short = short or any(request.status is RequestStatus.PREEMPTED for request in self._retiring)
        prefill = self._prefill(pending, admit=not short)
        if not decode and prefill is None:
            return None
        self._step_id = pending.serial
        pending.plan = SchedulerOutput(pending.serial, tuple(pending.copies), prefill, tuple(decode))
        for request in pending.plan.requests:
            request.last_step = pending.serial
        self._inflight.append(pending)
        return pending.plan

    def _decode(self, pending: PendingOutput) -> tuple[list[DecodeRow], bool]:
        """Return the rows to decode, and whether a row was left out for lack of blocks.

        After the first such row, no younger request gets new blocks.
        """
        rows, short = [], False
        for request in list(self._active):
            position, limit = request.position, request.max_len
            if request.status is not RequestStatus.RUNNING or position + 1 >= limit:
                continue  # just preempted, or the steps in flight reach max_tokens
            most = position + request.num_inflight_decodes * self.num_lookahead_tokens
            need = self._pages(min(most + 1, limit - 1) + self.num_lookahead_tokens) - len(request.block_ids)
            if need > 0:
                short = short or not self._allocate_slots(request, need)
                if short:
                    continue
            boundary = position // self.block_size * self.block_size
            written = most  # includes the last step's rejected tokens
            if not request.num_inflight_decodes:
                written += self.num_lookahead_tokens
            if boundary > request.last_snapshot_boundary and written - boundary <= self.rollback_tokens:
                self._snapshot(request, boundary, pending)
            rows.append(DecodeRow(request, position))
            request.num_inflight_decodes += 1
        return rows, short

    def _allocate_slots(self, request: Request, need: int) -> bool:
        """Give a request `need` more blocks, preempting the youngest; False if it must wait or was preempted."""
        while (pages := self.block_pool.allocate(need)) is None:
            if self._retiring:
                return False
            youngest = self._active[-1]
            youngest.preemptions += 1
            self._preemptions += 1
            self._retire(youngest, RequestStatus.PREEMPTED)
            if youngest is request:
                return False
        request.block_ids += pages
        return True

    def _prefill(self, pending: PendingOutput, admit: bool) -> PrefillChunk | None:
        """Return the next chunk of the prompt in prefill; with `admit`, else of the first waiting request."""
        request = next((s for s in self._active if s.status is RequestStatus.PREFILL), None)
        if request is None:
            request = self._admit(pending) if admit and self._waiting and self._slots else None
        if request is None:
            return None
        start, goal = request.num_scheduled_tokens, request.num_prefill_tokens
        boundary = (goal - 1) // self.block_size * self.block_size
        period = self.snapshot_interval_blocks * self.block_size or goal
        if start > request.last_snapshot_boundary and (start == boundary or start % period == 0):
            self._snapshot(request, start, pending)
        ends = [start // size * size + size for size in (self.max_num_batched_tokens, period)]
        request.num_scheduled_tokens = end = min([goal, *ends, *([boundary] if boundary > start else [])])
        if end == goal:
            request.status = RequestStatus.RUNNING
        return PrefillChunk(request, start, end - start, last=end == goal)

    def _admit(self, pending: PendingOutput) -> Request | None:
        """Give the first waiting request a slot, its cached prefix and new blocks; None if it has to wait."""
        request = self._waiting[0]
        usable = self._prefix_hashes(request)
        found, record = self.block_pool.match_prefix(usable)
        promised = {other.pending_prefix_hash for other in self._active}
        if not promised.isdisjoint(usable[found:]):
            return None  # another request is computing a prefix that this one could reuse
        need = self._pages(len(request.tokens)) - found
        spare = self._pages(max(len(request.tokens), request.max_len_reached) + self.block_size) - found
        most = self._pages(request.max_len - 1 + self.num_lookahead_tokens) - found
        if self.block_pool.num_available(usable[:found]) < min(spare, most):
            return None
        if self.kv_connector is not None:
            if self.kv_connector.is_loading(request) or not self.kv_connector.finish_load(request, usable):
                return None
            found, record = self.block_pool.match_prefix(usable)
            need = self._pages(len(request.tokens)) - found
        if not request.preemptions:
            self.block_pool.note(usable, found)
            request.num_cached_tokens = found * self.block_size
        request.block_ids = self.block_pool.touch(usable[:found]) + self.block_pool.allocate(need)
        request.state_slot = self._slots.pop()
        request.status = RequestStatus.PREFILL
        request.num_prefill_tokens = len(request.tokens)
        request.num_cached_blocks = request.num_published_blocks = found
        request.num_computed_tokens = request.num_scheduled_tokens = found * self.block_size
        request.last_snapshot_boundary = found * self.block_size
        if record is not None:
            pending.sources.append(self.block_pool.pin(usable[found - 1]))
            pending.copies.append((record, request.state_slot))
        request.pending_prefix_hash = usable[-1] if found < len(usable) else None
        bisect.insort(self._active, self._waiting.pop(0), key=_rank)
        return request

    def _snapshot(self, request: Request, boundary: int, pending: PendingOutput) -> None:
        """Copy the state slot into a snapshot for `boundary`; the slot is at most `rollback_tokens` past it."""
        request.last_snapshot_boundary = boundary
        if request.hash_seed is None or boundary > self._num_shareable_tokens(request):
            return
        name = self._block_hashes(request)[boundary // self.block_size - 1]
        if boundary > len(request.prompt):
            if request.decode_snapshot is not None:
                self.block_pool.drop_snapshot(request.decode_snapshot, unless_used=True)
            request.decode_snapshot = None
        record = self.block_pool.reserve_snapshot(name)
        if record is None:
            return
        if boundary > len(request.prompt):
            request.decode_snapshot = name
        request.snapshots.append(name)
        pending.copies.append((request.state_slot, record))
        pending.targets.append((request, name, record))

    # --- committing ------------------------------------------------------------------------------------------------

    def update_from_output(
        self, plan: SchedulerOutput, gained: Mapping[Hashable, Sequence[int]], finished: Collection[Hashable] = ()
    ) -> None:
        """Commit the results of the oldest plan in flight.

        Args:
            plan: the oldest uncommitted plan.
            gained: new tokens by id, of every request that decoded or finished its prefill; a request that ended
                meanwhile may be absent. Tokens beyond max_tokens are dropped; reaching max_tokens finishes the request.
            finished: ids that end here for another reason; the caller cuts their tokens where they end.

        Raises:
            ValueError: the plan is not the oldest one, or a request gained an impossible number of tokens.
        """
        if not self._inflight or self._inflight[0].plan is not plan:
            raise ValueError("plans are committed once, in the order in which they were made")
        pending = self._inflight.popleft()
        for request in plan.requests:
            if request.status in _LIVE:
                self._append_tokens(request, plan, gained.get(request.id, ()))
                if request.id in finished or len(request.tokens) >= request.max_len:
                    self._retire(request, RequestStatus.FINISHED)
        for record in pending.sources:
            self.block_pool.unpin(record)
        for request, name, record in pending.targets:
            judged = request.status not in (RequestStatus.ABORTED, RequestStatus.ERROR)
            self.block_pool.commit_snapshot(name, record, valid=judged)
        self._committed = plan.step_id
        for request in [s for s in self._retiring if s.last_step <= self._committed]:
            self._retiring.remove(request)
            self._free(request)

    def _append_tokens(self, request: Request, plan: SchedulerOutput, tokens: Sequence[int]) -> None:
        """Append the tokens of one plan, and publish the blocks that it filled."""
        accepted = len(tokens) - 1  # by the model, even beyond max_tokens
        tokens = list(tokens)[: request.max_len - len(request.tokens)]
        if plan.prefill is not None and plan.prefill.request is request:
            request.num_computed_tokens = plan.prefill.start + plan.prefill.count
            if plan.prefill.last:
                request.pending_prefix_hash = None
            least = most = int(plan.prefill.last)
        else:
            request.num_computed_tokens += len(tokens)
            request.num_inflight_decodes -= 1
            self._drafts, self._accepted = self._drafts + 1, self._accepted + accepted
            least, most = 1, 1 + self.num_lookahead_tokens
        if not least <= len(tokens) <= most:
            raise ValueError(f"request {request.id!r} gained {len(tokens)} tokens, where {least} to {most} can be")
        request.tokens += tokens
        full = min(request.num_computed_tokens, self._num_shareable_tokens(request)) // self.block_size
        if request.hash_seed is not None and full > request.num_published_blocks:
            names = self._block_hashes(request)
            for i in range(request.num_published_blocks, full):
                self.block_pool.cache_block(names[i - 1] if i else request.hash_seed, names[i], request.block_ids[i])
            request.num_published_blocks = full

    def _retire(self, request: Request, state: RequestStatus) -> None:
        """End or preempt a request; its resources are freed once no plan with it is in flight."""
        before, request.status = request.status, state
        if before is RequestStatus.PREEMPTED:
            return  # it is retiring already
        (self._waiting if before is RequestStatus.WAITING else self._active).remove(request)
        if request.last_step > self._committed:
            self._retiring.append(request)
        else:
            self._free(request)

    def _free(self, request: Request) -> None:
        """Free all resources; a preempted request is queued again, in order of rank."""
        self.block_pool.free(request.block_ids)
        if request.state_slot:
            self._slots.append(request.state_slot)
        request.block_ids, request.snapshots, request.state_slot = [], [], 0
        if request.status is not RequestStatus.PREEMPTED:
            del self.requests[request.id]
            return
        if self.deterministic_replay:
            request.max_len_reached = max(request.max_len_reached, len(request.tokens))
            del request.tokens[len(request.prompt) :]
        request.decode_snapshot = request.pending_prefix_hash = None
        request.num_prefill_tokens = 0
        request.num_scheduled_tokens = 0
        request.num_computed_tokens = 0
        request.num_inflight_decodes = 0
        request.num_cached_blocks = 0
        request.num_published_blocks = 0
        request.last_snapshot_boundary = 0
        request.status = RequestStatus.WAITING
        bisect.insort(self._waiting, request, key=_rank)

    # --- helpers and statistics ------------------------------------------------------------------------------------

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _num_shareable_tokens(self, request: Request) -> int:
        """Number of leading tokens whose blocks other requests may reuse."""
        return len(request.prompt) if self.deterministic_replay else request.max_len

    def _prefix_hashes(self, request: Request) -> list[bytes]:
        """Hashes of the prefix blocks that it could reuse; at least one token must be left to prefill."""
        return self._block_hashes(request)[: (len(request.tokens) - 1) // self.block_size]

    def _block_hashes(self, request: Request) -> list[bytes]:
        """Hashes of all blocks that its tokens fill; empty if it is excluded from the prefix cache."""
        if request.hash_seed is not None:
            parent = request.block_hashes[-1] if request.block_hashes else request.hash_seed
            done = len(request.block_hashes) * self.block_size
            if len(request.tokens) - done >= self.block_size:
                request.block_hashes += block_hash.block_hashes(
                    parent, request.tokens[done:], self.block_size, extra_keys=request.extra_keys, start=done
                )
        return request.block_hashes

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs, or a plan is uncommitted."""
        return bool(self.requests or self._inflight)

    def stats(self) -> dict[str, float]:
        """Counters and gauges, under vLLM's names where it has one.

        Returns:
            num_requests_waiting, num_requests_running: current requests.
            num_preemptions: preemptions since the start.
            kv_cache_usage_perc: blocks of running requests, as a fraction of all blocks.
            prefix_cache_queries, prefix_cache_hits, prefix_cache_repeats: tokens since the start, in whole blocks, that
                requests looked up, that they reused, and that they reused or had looked up before.
            spec_decode_num_drafts, spec_decode_num_draft_tokens, spec_decode_num_accepted_tokens: with lookahead, the
                decode steps of requests since the start, and the draft tokens proposed and accepted in them.
            Numbers of blocks and state snapshots, and their evictions (`BlockPool.stats`).
        """
        pool = self.block_pool.stats()
        counts = {
            "num_requests_waiting": len(self._waiting),
            "num_requests_running": len(self._active),
            "num_preemptions": self._preemptions,
            "kv_cache_usage_perc": pool["num_blocks_in_use"] / self.block_pool.capacity,
            "prefix_cache_queries": pool["queries"] * self.block_size,
            "prefix_cache_hits": pool["hits"] * self.block_size,
            "prefix_cache_repeats": pool["repeated"] * self.block_size,
        }
        if self.num_lookahead_tokens:
            counts |= {
                "spec_decode_num_drafts": self._drafts,
                "spec_decode_num_draft_tokens": self._drafts * self.num_lookahead_tokens,
                "spec_decode_num_accepted_tokens": self._accepted,
            }
        return counts | {name: value for name, value in pool.items() if name.startswith("num_")}

    def check_invariants(self) -> None:
        """Raise AssertionError if the state is inconsistent."""
        self.block_pool.check_invariants([request.block_ids for request in self.requests.values()])
        active, waiting = list(map(_rank, self._active)), list(map(_rank, self._waiting))
        arrivals = sorted((*active, *waiting), key=lambda rank: rank[0])  # stable: active ones first
        slots = [request.state_slot for request in (*self._active, *self._retiring)]
        waiting_slots = [request.state_slot for request in self._waiting]
        for rule, holds in {
            "sequences are in order of rank": [active, waiting] == [sorted(active), sorted(waiting)],
            "of each priority, active ones come before waiting ones": arrivals == sorted(arrivals),
            "every slot is free or one sequence's": len({*self._slots, *slots}) == len(self._slots) + len(slots),
            "slots are held by the active and the leaving only": all(slots) and not any(waiting_slots),
            "no sequence is lost": len(arrivals) + len(self._retiring) == len(self.requests),
            "one prompt is read at a time": sum(s.status is RequestStatus.PREFILL for s in self._active) <= 1,
        }.items():
            if not holds:
                raise AssertionError(f"the scheduler's state is inconsistent; the rule: {rule}")
