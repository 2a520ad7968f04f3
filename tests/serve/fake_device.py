"""A device that computes nothing but remembers, of every row of every page and record, which tokens it stands for.

Reading anything but one's own prefix is an assertion error: this is how silent wrong keys and values are found.
"""

import random
import zlib

from v4jax.cache import block_hash
from v4jax.cache.block_pool import BlockPool
from v4jax.serve.request import RequestStatus
from v4jax.serve.scheduler import Scheduler

STOP = 0
VOCABULARY = 5


def sample(salt, tokens):
    """The model: a token that depends on everything before it."""
    return zlib.crc32(repr((salt, list(tokens))).encode()) % VOCABULARY


def solo(salt, prompt, max_tokens):
    """What a request answers when it is alone."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(sample(salt, tokens))
        if tokens[-1] == STOP:
            break
    return tokens


class World:
    """A scheduler, the device, and an engine that commits on demand."""

    def __init__(self, *, pages=9, records=4, slots=3, block=2, chunk=4, random_seed=0, **options):
        self.blocks = BlockPool(pages, range(slots + 1, slots + 1 + records))
        self.scheduler = Scheduler(self.blocks, slots, block, chunk, **options)
        self.random = random.Random(random_seed)
        self.page = [[None] * block for _ in range(pages)]  # per row: (salt, tokens up to it)
        self.record = [None] * (1 + slots + records)  # (salt, tokens before it), rows ever written
        self.next = {}  # slot: the token to feed
        self.flight = []  # (plan, gained, tables)
        self.salts, self.everyone, self.admitted = {}, {}, []

    def add(self, id, prompt, max_tokens, salt="", priority=0):
        self.salts[id] = salt
        seed = None if salt is None else block_hash.hash_seed(b"weights", salt=salt)
        self.everyone[id] = self.scheduler.add_request(id, prompt, max_tokens, seed=seed, priority=priority)
        return self.everyone[id]

    # --- the device ------------------------------------------------------------------------------------------------

    def step(self):
        before = [(row, len(row.block_ids)) for row in self.scheduler._active]
        plan = self.scheduler.schedule()
        planned, starved = plan.requests if plan else [], False
        for row, pages in before:
            waits = row.status is RequestStatus.RUNNING and row not in planned and row.position + 1 < row.max_len
            starved = starved or waits
            assert not starved or len(row.block_ids) <= pages, "a younger one got pages that an older one waits for"
        if plan is not None:
            sources, targets = [a for a, _ in plan.copies], [b for _, b in plan.copies]
            assert len({*sources, *targets}) == len({*sources}) + len(targets), "the order of copies would matter"
            for target, content in zip(targets, [self.record[source] for source in sources], strict=True):
                self.record[target] = content
            tables = {row.id: list(row.block_ids) for row in plan.requests}
            gained = {row.request.id: self._decode(row, tables[row.request.id]) for row in plan.decode}
            if plan.prefill:
                row = plan.prefill.request
                gained[row.id] = self._prefill(plan.prefill, tables[row.id])
            self.flight.append((plan, gained, tables))
        return plan

    def _prefill(self, chunk, table):
        row, start, end = chunk.request, chunk.start, chunk.start + chunk.count
        salt = self.salts[row.id]
        if row.id not in self.admitted:
            self.admitted.append(row.id)
        if start == 0:
            self.record[row.state_slot] = (salt, []), 0
        (whose, before), written = self.record[row.state_slot]
        assert chunk.count > 0 and (whose, before[:start]) == (salt, row.tokens[:start]), "another one's record"
        assert written - start <= self.scheduler.rollback_tokens, "the rings do not reach back"
        self._read(table, salt, row.tokens[:start])
        for position in range(start, end):
            self._write(row, table, position, (salt, row.tokens[: position + 1]))
        self.record[row.state_slot] = (salt, row.tokens[:end]), max(written, end)
        self.next[row.state_slot] = sample(salt, row.tokens[:end])
        return [self.next[row.state_slot]] if chunk.last else []

    def _decode(self, decode, table):
        row, more = decode.request, self.scheduler.num_lookahead_tokens
        (salt, tokens), written = self.record[row.state_slot]
        position, accepted = len(tokens), self.random.randint(0, more)
        assert decode.position <= position <= decode.position + row.num_inflight_decodes * more, "the host lost count"
        assert salt == self.salts[row.id] and written - position <= self.scheduler.rollback_tokens
        self._read(table, salt, tokens)
        tokens = [*tokens, self.next[row.state_slot]]
        gained = [sample(salt, tokens)]
        for _ in range(accepted):
            tokens.append(gained[-1])
            gained.append(sample(salt, tokens))
        for place in range(position, position + more + 1):  # rejected ones are written, too
            self._write(row, table, place, (salt, tokens[: place + 1]) if place < len(tokens) else "rejected")
        self.record[row.state_slot] = (salt, tokens), max(written, position + more + 1)
        self.next[row.state_slot] = gained[-1]
        return gained

    def _read(self, table, salt, tokens):
        size = self.scheduler.block_size
        for position in range(min(len(tokens), len(table) * size)):
            found = self.page[table[position // size]][position % size]
            assert found == (salt, tokens[: position + 1]), "another one's page"

    def _write(self, row, table, position, content):
        block, place = divmod(position, self.scheduler.block_size)
        if block < len(table):
            owners = [s.id for s in self.scheduler.requests.values() if table[block] in s.block_ids]
            assert owners == [row.id], "others own the page, too"
            self.page[table[block]][place] = content
        else:
            assert position >= row.max_len - 1 + self.scheduler.num_lookahead_tokens, (
                "a token that may count has no page"
            )

    # --- the engine ------------------------------------------------------------------------------------------------

    def commit(self):
        """Commit the oldest plan; sequences end at STOP."""
        plan, gained, _ = self.flight.pop(0)
        finished = set()
        for id, tokens in gained.items():
            if STOP in tokens:
                gained[id] = tokens[: tokens.index(STOP) + 1]
                finished.add(id)
        self.scheduler.update_from_output(plan, gained, finished)

    def drain(self, steps=5000):
        """Run one step ahead until nothing is left."""
        while self.scheduler.busy:
            assert (steps := steps - 1) > 0, "it goes on for ever"
            if len(self.flight) == 2 or (self.flight and self.random.random() < 0.3):
                self.commit()
            elif self.step() is None:
                assert self.flight, "something waits, but nothing runs"
                self.commit()
            self.check()
        self.settled()

    # --- what must always hold -------------------------------------------------------------------------------------

    def check(self):
        self.scheduler.check_invariants()
        for plan, _, tables in self.flight:
            for row in plan.requests:  # what may still be written is still theirs
                assert row.block_ids[: len(tables[row.id])] == tables[row.id] and row.state_slot
        gone = [s.rank for s in self.scheduler.requests.values() if s.status is RequestStatus.PREEMPTED]
        assert min(gone, default=(10**9,)) > max((s.rank for s in self.scheduler._active), default=(-(10**9),))
        size = self.scheduler.block_size
        for name, page in self.blocks._page.items():
            salt, tokens = self.page[page][-1]
            assert all(self.page[page][-1 - i] == (salt, tokens[: len(tokens) - i]) for i in range(size))
            assert self._name(salt, tokens) == name, "a page is found under another one's name"
        for name in self.blocks._record.keys() - self.blocks._uncommitted:
            (salt, tokens), written = self.record[self.blocks._record[name]]
            ends = [n for n in range(size, len(tokens) + 1, size) if self._name(salt, tokens[:n]) == name]
            assert ends and written - ends[0] <= self.scheduler.rollback_tokens, (
                "a record is found under another one's name"
            )

    def _name(self, salt, tokens):
        return block_hash.block_hashes(block_hash.hash_seed(b"weights", salt=salt), tokens, self.scheduler.block_size)[
            -1
        ]

    def settled(self):
        """Nothing is left but cached blocks, and everyone got the answer it gets alone."""
        stats = self.scheduler.stats()
        assert stats["num_blocks_in_use"] == stats["num_requests_waiting"] == stats["num_requests_running"] == 0
        assert stats["num_snapshots_free"] + stats["num_snapshots_cached"] == len(self.blocks._records)
        assert not any(self.blocks._pins.values())
        ranks = sorted((self.everyone[id].rank for id in self.admitted), key=lambda rank: rank[0])
        assert ranks == sorted(ranks), "first come, of equal priorities"
        for id, row in self.everyone.items():
            answer = solo(self.salts[id], row.prompt, row.max_tokens)
            if row.status is RequestStatus.FINISHED:
                assert row.tokens == answer
            else:
                assert row.status in (RequestStatus.ABORTED, RequestStatus.ERROR)
                assert row.tokens == answer[: len(row.tokens)]


def decoded(plan):
    """Requests that a plan decodes a token of."""
    return [row.request.id for row in plan.decode]
