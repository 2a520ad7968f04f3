"""Many requests through one model at once, over the paged cache.

Every `step` asks the scheduler for a plan (one chunk of one prompt, one token or a few for all that decode), sends it
to the device, and then takes the results of the plan before: while the host turns tokens into text, the device
computes. Nothing but the drawn tokens crosses to the host; tables and options cross to the device only when they
change.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections import deque
from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax import config
from v4jax.cache import prefix
from v4jax.cache.blocks import Blocks
from v4jax.cache.spec import Layout
from v4jax.core.check import UserError
from v4jax.models.quantised import check_precision, quantise
from v4jax.models.transformer import Transformer
from v4jax.serve import live, parking, programs
from v4jax.serve.programs import Heads, Live
from v4jax.serve.sampling import Sampled, SamplingParams, batch_options
from v4jax.serve.scheduler import Scheduler
from v4jax.serve.sequence import Plan, Sequence, State

_ENDED = (State.FINISHED, State.CANCELLED, State.FAILED)
_LEAST_CHUNK = 16  # tokens
_log = logging.getLogger(__name__)

_NOT_FINITE = Sampled(np.zeros((1, 1), np.int32), np.zeros((1, 1), bool))  # what a chunk that is not draws


class Drawn(NamedTuple):
    """New tokens of one request: the positions `first` to `first + count` of row `row` of `sampled` (numpy arrays)."""

    id: Hashable
    sampled: Sampled
    row: int
    count: int


class _Flight(NamedTuple):
    """A plan under way, its results still on the device: whether its prefill is finite, the token after a prompt's
    last chunk, and the tokens of its decode rows."""

    plan: Plan
    finite: jax.Array | None
    first: tuple[Sampled, jax.Array] | None
    rows: tuple[Sampled, jax.Array] | None


class Engine:
    """Runs requests through one model; its cache is allocated here and lives as long as the engine."""

    def __init__(self, model: Transformer, limits: config.Serve, cache: config.Cache | None = None):
        self.model, self.limits, cache = model.config, limits, cache or config.Cache()
        check_limits(self.model, limits, cache)
        if any(run.repeats > 1 for run in model.runs):
            raise UserError("the engine cannot run layers that are held stacked; load the model with scan=False")
        if limits.precision == "fp8":
            model = quantise(model)
        graphdef, variables = nnx.split(model)
        # A flat list of arrays, because JAX walks lists natively and nnx's trees in Python, every step.
        self._weights, tree = jax.tree.flatten(variables)
        self._structure = programs.structure(graphdef, tree)
        self.layout = Layout(self.model, cache.layout, cache.block, cache.hot)
        block, slots, k = self.layout.block, limits.max_batch, limits.speculative_tokens
        self._table_width = -(-(limits.max_seq_len + k) // block)
        kept = range(slots + 1, slots + 1 + (cache.records if cache.prefix else 0))
        pages = self._pages(cache, 1 + slots + len(kept))
        self.scheduler = Scheduler(
            Blocks(pages, kept), slots, block, block if limits.batch_invariant else limits.prefill_chunk,
            record_every=cache.record_every, lookahead=k, replay=limits.batch_invariant,
        )  # fmt: skip
        longest = self.scheduler.chunk
        self._sizes = [longest] if limits.batch_invariant else chunk_sizes(longest)
        self._seed = self._digest(variables) if cache.prefix else None
        self._live = self._allocate(model, pages, 1 + slots + len(kept), self.scheduler.slack + k)
        if cache.hot:
            _log.info(
                "cache: CSA entries of %s tokens in host memory (%s bytes), %s of a layer on the device",
                *(f"{n:,}" for n in ((pages - 1) * block, pages * self.layout.host_page_bytes, cache.hot)),
            )
        heads = Heads(*(jnp.zeros((slots + 1, *shape), jnp.int32) for shape in ((), (), (k,))))
        state = (self._live, heads)
        self._live, self._heads = live.committed(state) if cache.hot else state
        self._tables = np.full((slots + 1, self._table_width), -1, np.int32)
        self._device_tables = jax.device_put(self._tables.copy())
        self._sampling: dict[Hashable, SamplingParams] = {}
        self._batch, self._device_batch = (), None
        self._flight: deque[_Flight] = deque()
        self.parking = parking.build(self._live, cache, self.layout)
        if self.parking is not None:
            self.parking.attach(self.scheduler)

    def _pages(self, cache: config.Cache, records: int) -> int:
        """Pages of every pool, page 0 among them."""
        k, block = self.limits.speculative_tokens, self.layout.block
        if not cache.device:
            return 1 + (-(-cache.tokens // block) or self.limits.max_batch * self._table_width)
        fixed = records * self.layout.record_bytes(3 * k, mtp=k > 0) + self.layout.hot_bytes
        least = fixed + 2 * self.layout.page_bytes
        if cache.device < least:
            parts = f"{records} records and one block of {block} tokens"
            parts, lower = (f"{parts} and the hot entries", "records or hot") if cache.hot else (parts, "records")
            raise UserError(
                f"a cache of {cache.device:,} bytes on the device is too small: {parts} take {least:,}; give it "
                f"more, or lower max_batch or the cache's {lower}"
            )
        return self.layout.pages_for(cache.device - fixed)

    def _allocate(self, model: Transformer, pages: int, records: int, slack: int) -> Live:
        one = lambda kind: live.new_layer(self.layout, kind, pages, records, slack)
        layers = [[one(kind) for kind, _ in run.kinds] for run in model.runs]
        return Live(layers, one("swa") if self.limits.speculative_tokens else None)

    def _digest(self, variables) -> bytes:
        """Seed of the names of blocks: all that their contents depend on besides the tokens."""
        leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}
        # Where bits are promised, blocks from another run are of use only if the same programs computed them.
        bits = (jax.__version__, jax.default_backend()) if self.limits.batch_invariant else ()
        return prefix.seed(prefix.digest(leaves), self.model, self.layout.name, self.layout.block, *bits)

    # --- requests --------------------------------------------------------------------------------------------------

    def check(self, prompt: list[int], sampling: SamplingParams, name: str) -> None:
        """Raise UserError, calling the prompt `name`, if the request cannot be run."""
        limit = self.limits.max_seq_len
        if not prompt:
            raise UserError(f"{name} is empty; a prompt needs at least one token")
        if min(prompt) < 0 or max(prompt) >= self.model.vocab_size:
            bad = next(i for i in prompt if not 0 <= i < self.model.vocab_size)
            raise UserError(f"{name} has token id {bad}; the model's ids are 0 to {self.model.vocab_size - 1}")
        if len(prompt) + sampling.max_tokens > limit:
            raise UserError(
                f"{name} has {len(prompt)} tokens, which with max_tokens {sampling.max_tokens} exceeds max_seq_len"
                f" {limit}; shorten one of them or raise max_seq_len (the model takes up to {self.model.max_positions})"
            )
        self.scheduler.check_fits(len(prompt), sampling.max_tokens)

    def add(self, id: Hashable, prompt: list[int], sampling: SamplingParams, salt: str = "") -> None:
        """Queue a request that `check` has passed. salt: it shares blocks only with requests of the same salt."""
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(64))
        seed = self._seed and prefix.seed(self._seed, salt=salt)
        self.scheduler.add(id, prompt, sampling.max_tokens, seed=seed)
        self._sampling[id], self._batch = sampling, ()  # an id may come again with other options

    def finish(self, id: Hashable) -> None:
        """End a request whose text is complete."""
        self.scheduler.finish(id)

    def cancel(self, id: Hashable) -> None:
        """Drop a request, at any moment; what it holds is freed."""
        self.scheduler.cancel(id)

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs, or results are under way."""
        return self.scheduler.busy

    # --- steps -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Drawn]:
        """Send the next plan to the device, take the results of the one before: new tokens by request.

        A request whose logits were not finite has ended, failed, when its tokens (whose `finite` says so) come.
        """
        plan = self.scheduler.step()
        self._park(waits=plan is None and not self._flight)
        if plan is not None:
            self._flight.append(self._send(plan))
        drawn = self._take(self._flight.popleft()) if len(self._flight) > (plan is not None) else []
        if not self.busy:
            self._park()
        return drawn

    @jax.transfer_guard("disallow")
    def _park(self, waits: bool = False) -> None:
        """Move between the device and the tiers below what the scheduler's books have moved."""
        if self.parking is not None:
            self._live = self.parking.carry_out(self._live, idle=not self.busy)
            if waits:
                self.parking.wait()

    def close(self, seconds: float = 10.0) -> None:
        """Move what is idle to the tiers below the device, in so many seconds at most, and leave them. For good."""
        if self.parking is not None:
            self.parking.close(self._live, seconds)
            self.parking = self.scheduler.below = self.scheduler.blocks.watch = None

    @jax.transfer_guard("disallow")
    def _send(self, plan: Plan) -> _Flight:
        for source, target in plan.copies:
            self._live = programs.copy(self._live, *jax.device_put((np.int32(source), np.int32(target))))
        self._set_tables(plan.sequences)
        finite, first = self._prefill(*plan.prefill) if plan.prefill else (None, None)
        rows = self._decode([row.sequence for row in plan.decode]) if plan.decode else None
        return _Flight(plan, finite, first, rows)

    def _set_tables(self, sequences: list[Sequence]) -> None:
        changed = False
        for sequence in sequences:
            row = self._table(sequence)
            if not np.array_equal(row, self._tables[sequence.slot]):
                self._tables[sequence.slot], changed = row, True
        if changed:
            self._device_tables = jax.device_put(self._tables.copy())

    def _table(self, sequence: Sequence) -> np.ndarray:
        row = np.full(self._table_width, -1, np.int32)
        row[: len(sequence.pages)] = sequence.pages
        return row

    def _prefill(self, sequence: Sequence, start: int, count: int, last: bool):
        size = next(size for size in self._sizes if size >= count)
        tokens = np.zeros(size + 1, np.int32)
        known = sequence.tokens[start : start + count + 1]
        tokens[: len(known)] = known
        scalars = (np.int32(start), np.int32(count), np.int32(sequence.slot))
        inputs = jax.device_put((tokens, *scalars))
        self._live, x_11XD, finite = programs.prefill(
            self._structure, self._weights, self._live, *inputs, self._device_tables
        )
        if not last:
            return finite, None
        place = jax.device_put((np.array([sequence.slot], np.int32), np.array([start + count], np.int32)))
        options = batch_options([self._sampling[sequence.id]], 1)
        logits_BTV = programs.logits(self._structure, self._weights, x_11XD)
        return finite, self._draw(logits_BTV, place, options, x_11XD)

    def _decode(self, sequences: list[Sequence]):
        batch = tuple((sequence.slot, sequence.id) for sequence in sequences)
        if batch != self._batch:
            size = min(1 << (len(batch) - 1).bit_length(), self.limits.max_batch)
            record_B = np.zeros(size, np.int32)
            record_B[: len(batch)] = [slot for slot, _ in batch]
            options = batch_options([self._sampling[id] for _, id in batch], size)
            self._batch, self._device_batch = batch, (jax.device_put(record_B), options)
        record_B, options = self._device_batch
        rows = (record_B, self._device_tables)
        self._live, x_BTXD, logits_BTV = programs.decode(
            self._structure, self._weights, self._live, self._heads, rows, self.limits.batch_invariant
        )
        return self._draw(logits_BTV, (record_B, None), options, x_BTXD)

    def _draw(self, logits_BTV, place, options, x_BTXD):
        """Tokens of the positions just read, and drafts of what follows them."""
        self._heads, drawn = programs.draw(logits_BTV, self._heads, place, *options, self.limits.batch_invariant)
        if self._live.mtp is not None:
            sampled, count_B = drawn
            mtp, self._heads = programs.draft(
                self._structure,
                self._weights,
                self._live.mtp,
                self._heads,
                x_BTXD,
                (sampled.token_B, count_B),
                place[0],
            )
            self._live = self._live._replace(mtp=mtp)
        return drawn

    @jax.transfer_guard("disallow")
    def _take(self, flight: _Flight) -> list[Drawn]:
        plan, (finite, first, rows) = flight.plan, jax.device_get(flight[1:])
        drawn, failed = [], []
        if finite is not None and not finite:
            failed.append(plan.prefill.sequence)
            first = first or (_NOT_FINITE, None)
        if first is not None:
            drawn.append(Drawn(plan.prefill.sequence.id, first[0], 0, 1))
        if rows is not None:
            drawn += [Drawn(row.sequence.id, rows[0], i, int(rows[1][i])) for i, row in enumerate(plan.decode)]
        alive = {id: s for id, s in self.scheduler.sequences.items() if s.state not in _ENDED}
        drawn = [d for d in drawn if d.id in alive]
        failed += [alive[d.id] for d in drawn if not d.sampled.finite_B[d.row, : d.count].all()]
        for sequence in failed:
            self._fail(sequence)
        gained = {d.id: d.sampled.token_B[d.row, : d.count].tolist() for d in drawn}
        drawn = [d for d in drawn if not alive[d.id].repeats]
        self.scheduler.commit(plan, gained)
        for id in [id for id in self._sampling if id not in self.scheduler.sequences]:
            del self._sampling[id]
        return drawn

    def _fail(self, sequence: Sequence) -> None:
        """End a request whose logits are not finite; what it alone wrote is wiped before others may get it."""
        slot, pages = sequence.slot, self._table(sequence)
        pages[: sequence.found] = -1
        if self.scheduler.fail(sequence.id):
            self._live = programs.wipe(self._live, *jax.device_put((np.int32(slot), pages)))

    def stats(self) -> dict[str, float]:
        """Counts of sequences, pages and prefix hits, of the cache's bytes (`live.stats`), and of the tiers."""
        below = {} if self.parking is None else self.parking.stats()
        return self.scheduler.stats() | live.stats(self._live) | below


def chunk_sizes(longest: int) -> list[int]:
    """What prompt chunks of up to `longest` tokens are padded to, ascending: 16, 64, ..., and then quarters of the
    longest. Few programs, and little padding where it costs most."""
    sizes = {max(_LEAST_CHUNK, longest * quarters // 4) for quarters in (1, 2, 3, 4)}
    size = _LEAST_CHUNK
    while size < longest // 4:
        sizes.add(size)
        size *= 4
    return sorted(sizes)


def check_limits(model: config.Model, limits: config.Serve, cache: config.Cache) -> None:
    """Raise UserError for limits that cannot be kept."""
    for name in ("max_batch", "max_seq_len", "prefill_chunk"):
        if getattr(limits, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(limits, name)}")
    if limits.max_seq_len > model.max_positions:
        raise UserError(f"max_seq_len {limits.max_seq_len} exceeds the {model.max_positions} positions of the model")
    check_precision(limits.precision)
    if limits.speculative_tokens < 0 or cache.tokens < 0 or cache.records < 0 or cache.record_every < 0:
        raise UserError("speculative_tokens, cache tokens, records and record_every must be at least 0")
    if limits.speculative_tokens and not model.mtp_layers:
        raise UserError("speculative_tokens needs a model with an MTP layer, and this one has none; set it to 0")
    if limits.speculative_tokens and limits.batch_invariant:
        raise UserError("batch_invariant and speculative_tokens exclude each other: drafts change the shapes computed")
    parking.check(cache)
    live.check(model, limits, cache)
