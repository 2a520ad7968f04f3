"""The engine: runs many requests through one model at once, over the paged KV cache.

Every `step` asks the scheduler for a plan (one prefill chunk, and one decode step of every running request), dispatches
it to the device, and then collects the results of the plan before. The device computes while the host turns tokens
into text. Only sampled tokens are copied to the host; block tables and sampling options are uploaded only when they
change.

On a mesh every device is a data-parallel rank with its own scheduler, state slots and blocks. One step runs the plans
of all devices, padded to the largest batch and chunk among them. A request stays on the device to which it was
assigned: the one with the fewest tokens left to compute, cached prompt blocks excluded.

**Errors.** An exception may leave a step anywhere, with donated buffers gone and host state half changed. So every
call that changes the engine sets `broken` at its start and clears it at its end, and every call first resets a broken
engine: it drops all requests and allocates the device's cache anew. The exception itself reaches the caller unchanged.
Blocks in the offload tiers stay, because they carry hashes and checksums of their own.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import secrets
from collections import deque
from collections.abc import Hashable
from itertools import zip_longest
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax import config
from v4jax.cache import allocate, block_hash, weights_digest
from v4jax.cache.block_pool import BlockPool
from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.cache.offload.manager import FLUSH_SECONDS
from v4jax.core.errors import UserError
from v4jax.models.quantize import quantize_model
from v4jax.models.transformer import Transformer
from v4jax.serve import balance, data_parallel, model_steps, offload_connector
from v4jax.serve.kv_cache_sizes import check_enough_memory, kv_cache_sizes
from v4jax.serve.model_steps import DecodeState, KVCaches
from v4jax.serve.request import PrefillChunk, Request, RequestStatus, SchedulerOutput
from v4jax.serve.sampling import SamplerOutput, SamplingParams, make_sampling_tensors
from v4jax.serve.scheduler import Scheduler

_ENDED = (RequestStatus.FINISHED, RequestStatus.ABORTED, RequestStatus.ERROR)
_LEAST_CHUNK = 16  # tokens
_log = logging.getLogger(__name__)

_NOT_FINITE = SamplerOutput(np.zeros((1, 1), np.int32), np.zeros((1, 1), bool))  # for a non-finite chunk
_PADDING = SamplingParams(temperature=0.0, seed=0)  # of a row that only fills up a batch


class SampledTokens(NamedTuple):
    """New tokens of one request: the first `count` positions of row `row` of `sampled` (numpy arrays)."""

    id: Hashable
    sampled: SamplerOutput
    row: int
    count: int


class InflightStep(NamedTuple):
    """One dispatched step, whose results are still on the devices.

    `finite` tells which prefill chunks are finite; `first` holds the tokens sampled after prompts' last chunks, `rows`
    those of the decode rows, `size` rows per device.
    """

    plans: list[SchedulerOutput | None]
    size: int
    finite: jax.Array | None
    first: tuple[SamplerOutput, jax.Array] | None
    rows: tuple[SamplerOutput, jax.Array] | None


def _reset_on_error(method):
    """Decorate a method of `Engine`: after an exception inside it, the next call resets the engine."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        self._recover()
        self.broken = True
        result = method(self, *args, **kwargs)
        self.broken = False
        return result

    return run


class Engine:
    """Runs requests through one model; its cache is allocated here and lives as long as the engine.

    One thread at a time may call it; `engine_loop.EngineLoop` serves many threads. `broken` tells whether the next call
    resets the engine first.

    Args:
        limits, cache: sizes of each device.
        on: the devices (`data_parallel.data_parallel_group`); None means the default device.
    """

    def __init__(
        self,
        model: Transformer,
        limits: config.Serve,
        cache: config.Cache | None = None,
        on: data_parallel.DataParallelGroup | None = None,
    ):
        self.model = model.config
        self.limits = limits
        cache = cache or config.Cache()
        self.dp_group = on or data_parallel.data_parallel_group(None)
        validate_limits(self.model, limits, cache)
        data_parallel.validate_engine(self.dp_group, self.model, limits, cache)
        check_enough_memory(self.model, limits, cache, self.dp_group)
        if any(run.repeats > 1 for run in model.stack_specs):
            raise UserError("the engine cannot run layers that are held stacked; load the model with scan=False")
        if limits.quantization == "fp8":
            model = quantize_model(model)
        graphdef, variables = nnx.split(model)
        # A flat list of arrays, because JAX walks lists natively and nnx's trees in Python, every step.
        weights, tree = jax.tree.flatten(variables)
        self._model_def = model_steps.model_def(graphdef, tree, self.dp_group.sharding)
        self._weights = self._model_def.placed(weights)
        self.kv_cache_spec = KVCacheSpec(self.model, cache.kv_cache_dtype, cache.block_size, cache.kv_device_entries)
        block, slots = self.kv_cache_spec.block_size, limits.max_num_seqs
        self._cache_sizes = kv_cache_sizes(self.kv_cache_spec, limits, cache)
        self._table_width = self._cache_sizes.table_width
        snapshot_slots = range(1 + slots, self._cache_sizes.num_state_slots)
        longest = block if limits.batch_invariant else limits.max_num_batched_tokens
        self._sizes = [longest] if limits.batch_invariant else chunk_sizes(longest)
        self._seed = self._digest(variables) if cache.enable_prefix_caching else None
        self._kinds = [[layer.attention for layer in run.pattern] for run in model.stack_specs]
        self.schedulers: list[Scheduler] = []
        self.reset()
        if cache.kv_device_entries:
            host_bytes = allocate.memory_stats(self._kv_caches)["kv_host_bytes"]
            _log.info(
                "cache: CSA entries of %s tokens in host memory (%s bytes), %s of a layer on the device",
                f"{(self._cache_sizes.num_blocks - 1) * block:,}",
                f"{host_bytes:,}",
                f"{cache.kv_device_entries:,}",
            )
        self.kv_connector = offload_connector.build(self._kv_caches, self.dp_group, cache, self.kv_cache_spec)
        self.schedulers = [
            Scheduler(
                BlockPool(self._cache_sizes.num_blocks, snapshot_slots),
                slots,
                block,
                longest,
                snapshot_interval_blocks=cache.snapshot_interval_blocks,
                lookahead=limits.num_speculative_tokens,
                replay=limits.batch_invariant,
                kv_connector=self.kv_connector and self.kv_connector.device_connectors[rank],
            )
            for rank in range(self.dp_group.count)
        ]

    def reset(self) -> None:
        """Drop all requests and the device's cache; the offload tiers keep their blocks.

        The arrays are allocated anew: a program that failed may have taken the old ones, or left NaN in them.
        """
        self.broken = True
        self._forget()
        self._kv_caches = self._decode_state = self._device_tables = None  # free before allocating: both may not fit
        self._allocate()
        self.broken = False

    def _forget(self) -> None:
        """Reset the host state of all requests and schedulers."""
        self._scheduler_of: dict[Hashable, Scheduler] = {}
        self._sampling: dict[Hashable, SamplingParams] = {}
        self._batch = ()
        self._device_batch = None
        self._inflight: deque[InflightStep] = deque()
        for scheduler in self.schedulers:
            scheduler.reset()

    def _allocate(self) -> None:
        slots, k = self.limits.max_num_seqs, self.limits.num_speculative_tokens
        with jax.transfer_guard("allow"):
            room = (self._cache_sizes.num_blocks, self._cache_sizes.num_state_slots, self._cache_sizes.slack)
            one = lambda kind: self.dp_group.replicate(allocate.allocate_layer(self.kv_cache_spec, kind, *room))
            self._kv_caches = KVCaches([[one(kind) for kind in run] for run in self._kinds], one("swa") if k else None)
            decode_state = DecodeState(*(jnp.zeros((slots + 1, *shape), jnp.int32) for shape in ((), (), (k,))))
            self._decode_state = self.dp_group.replicate(decode_state)
        self._tables = np.full((self.dp_group.count, slots + 1, self._table_width), -1, np.int32)
        self._upload_block_tables()

    def _recover(self) -> None:
        """Reset an engine that an exception left half changed."""
        if not self.broken:
            return
        if (processes := len(set(self.dp_group.processes))) > 1:
            raise UserError(
                f"a step of this engine failed in one of its {processes} processes, which no longer agree; end all of "
                "them and start again"
            )
        _log.warning("the engine is reset after an error in a step: its requests and the device's cache are dropped")
        self.reset()

    def _digest(self, variables) -> bytes:
        """Hash everything but the tokens that block contents depend on; the seed of all block hashes."""
        # Batch invariance promises equal bits, so only blocks computed by the same programs may be reused.
        bits = (jax.__version__, jax.default_backend()) if self.limits.batch_invariant else ()
        return block_hash.hash_seed(
            weights_digest.weights_digest(variables),
            self.model,
            self.kv_cache_spec.kv_cache_dtype,
            self.kv_cache_spec.block_size,
            *bits,
        )

    # --- requests --------------------------------------------------------------------------------------------------

    def check(self, prompt: list[int], sampling: SamplingParams, name: str) -> None:
        """Raise UserError, calling the prompt `name`, if the request cannot be run."""
        limit = self.limits.max_model_len
        if not prompt:
            raise UserError(f"{name} is empty; a prompt needs at least one token")
        if min(prompt) < 0 or max(prompt) >= self.model.vocab_size:
            bad = next(i for i in prompt if not 0 <= i < self.model.vocab_size)
            raise UserError(f"{name} has token id {bad}; the model's ids are 0 to {self.model.vocab_size - 1}")
        if len(prompt) + sampling.max_tokens > limit:
            raise UserError(
                f"{name} has {len(prompt)} tokens, which with max_tokens {sampling.max_tokens} exceeds max_model_len "
                f"{limit}; shorten one of them or raise max_model_len (the model takes up to "
                f"{self.model.max_position_embeddings})"
            )
        self.schedulers[0].check_fits(len(prompt), sampling.max_tokens)

    def add_request(self, id: Hashable, prompt: list[int], sampling: SamplingParams, salt: str = "") -> None:
        """Queue a request that `check` accepted; it shares blocks only with requests of the same `salt`.

        Raises ValueError for an id that is in use.
        """
        self._recover()
        if id in self._scheduler_of and id in self._scheduler_of[id].requests:
            raise ValueError(f"request {id!r} is in use")
        self._add(id, prompt, sampling, salt)

    @_reset_on_error
    def _add(self, id: Hashable, prompt: list[int], sampling: SamplingParams, salt: str) -> None:
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(64))
        seed = self._seed and block_hash.hash_seed(self._seed, salt=salt)
        num_offloaded = self.kv_connector and self.kv_connector.num_offloaded_blocks
        scheduler = balance.select_scheduler(self.schedulers, prompt, sampling.max_tokens, seed, num_offloaded)
        scheduler.add_request(id, prompt, sampling.max_tokens, seed=seed)
        self._scheduler_of[id] = scheduler
        self._sampling[id] = sampling
        self._batch = ()  # an id may come again with other options

    @_reset_on_error
    def finish_request(self, id: Hashable) -> None:
        """End a request whose text is complete."""
        if id in self._scheduler_of:
            self._scheduler_of[id].finish_request(id)

    @_reset_on_error
    def abort_request(self, id: Hashable) -> None:
        """Drop a request at any moment and free its resources."""
        if id in self._scheduler_of:
            self._scheduler_of[id].abort_request(id)

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs, or a step is in flight."""
        self._recover()
        return self._has_work

    @property
    def _has_work(self) -> bool:
        return any(scheduler.busy for scheduler in self.schedulers)

    # --- steps -----------------------------------------------------------------------------------------------------

    @_reset_on_error
    def step(self) -> list[SampledTokens]:
        """Dispatch the next plan, then return the new tokens of the plan before, per request.

        A request with non-finite logits has already failed when its tokens, marked by `finite_B`, are returned. An
        exception ends all requests; the next call starts with an empty engine.
        """
        if self.kv_connector is not None:
            self.kv_connector.sync_loads()
        plans = [scheduler.schedule() for scheduler in self.schedulers]
        any_plan = any(plan is not None for plan in plans)
        self._run_offload(waits=not any_plan and not self._inflight)
        if any_plan:
            self._inflight.append(self._dispatch(plans))
        drawn = self._collect(self._inflight.popleft()) if len(self._inflight) > any_plan else []
        if not self._has_work:
            self._run_offload()
        return drawn

    def _run_offload(self, waits: bool = False) -> None:
        """Copy blocks between device and offload tiers, as the schedulers' block pools require."""
        if self.kv_connector is not None:
            self._kv_caches = self.kv_connector.run_transfers(self._kv_caches, idle=not self._has_work)
            if waits:
                self.kv_connector.wait_for_load()

    def close(self, seconds: float = FLUSH_SECONDS) -> None:
        """Store idle blocks in the offload tiers within `seconds`, then detach from the tiers permanently."""
        if self.kv_connector is not None:
            if self.broken:
                self._forget()
            self.kv_connector.close(self._kv_caches, seconds)
            self.kv_connector = None
            for scheduler in self.schedulers:
                scheduler.kv_connector = scheduler.block_pool.on_idle = None

    def _dispatch(self, plans: list[SchedulerOutput | None]) -> InflightStep:
        put = self.dp_group.shard_rows
        some = lambda name: [() if plan is None else getattr(plan, name) for plan in plans]
        for pairs in zip_longest(*some("copies"), fillvalue=(0, 0)):
            source_D, target_D = np.array(pairs, np.int32).T.copy()
            self._kv_caches = model_steps.copy_state(self._model_def, self._kv_caches, *put((source_D, target_D)))
        self._set_tables(some("requests"))
        reads = [None if plan is None else plan.prefill for plan in plans]
        finite, first = self._prefill(reads) if any(reads) else (None, None)
        rows = [[row.request for row in decode] for decode in some("decode")]
        size = min(1 << (max(map(len, rows)) - 1).bit_length(), self.limits.max_num_seqs)
        return InflightStep(plans, size, finite, first, self._decode(rows, size) if any(rows) else None)

    def _set_tables(self, requests: list[list[Request]]) -> None:
        changed = False
        for device, here in enumerate(requests):
            for request in here:
                row = self._table(request)
                if not np.array_equal(row, self._tables[device, request.state_slot]):
                    self._tables[device, request.state_slot] = row
                    changed = True
        if changed:
            self._upload_block_tables()

    def _upload_block_tables(self) -> None:
        self._device_tables = self.dp_group.shard_rows(self._tables.reshape(-1, self._table_width).copy())

    def _table(self, request: Request) -> np.ndarray:
        row = np.full(self._table_width, -1, np.int32)
        row[: len(request.block_ids)] = request.block_ids
        return row

    def _prefill(self, reads: list[PrefillChunk | None]):
        """Prefill one chunk per device that has one; sample after a prompt's last chunk."""
        size = next(size for size in self._sizes if size >= max(read.count for read in reads if read))
        tokens_DT = np.zeros((len(reads), size + 1), np.int32)
        scalars_3D = np.zeros((3, len(reads)), np.int32)  # start, count, state slot
        for device, read in enumerate(reads):
            if read:
                known = read.request.tokens[read.start : read.start + read.count + 1]
                tokens_DT[device, : len(known)] = known
                scalars_3D[:, device] = read.start, read.count, read.request.state_slot
        self._kv_caches, x_D1XD, finite_D = model_steps.prefill(
            self._model_def,
            self._weights,
            self._kv_caches,
            *self.dp_group.shard_rows((tokens_DT, *scalars_3D)),
            self._device_tables,
        )
        ended = [read if read and read.last else None for read in reads]
        if not any(ended):
            return finite_D, None
        place = [(read.request.state_slot, read.start + read.count) if read else (0, 0) for read in ended]
        state_slot_D, position_D = np.array(place, np.int32).T.copy()
        options = self._options([[read.request.id] if read else [] for read in ended], 1)
        logits_DTV = model_steps.logits(self._model_def, self._weights, x_D1XD)
        return finite_D, self._sample(logits_DTV, self.dp_group.shard_rows((state_slot_D, position_D)), options, x_D1XD)

    def _options(self, ids: list[list[Hashable]], size: int):
        """Build the sampling options, padded to `size` rows per device."""
        rows = [[self._sampling[id] for id in here] + [_PADDING] * (size - len(here)) for here in ids]
        options, plan = make_sampling_tensors([row for here in rows for row in here])
        return self.dp_group.shard_rows(options), plan

    def _decode(self, rows: list[list[Request]], size: int):
        batch = tuple(tuple((request.state_slot, request.id) for request in here) for here in rows)
        if batch != self._batch:
            record_DB = np.zeros((len(rows), size), np.int32)
            for device, here in enumerate(batch):
                record_DB[device, : len(here)] = [slot for slot, _ in here]
            options = self._options([[id for _, id in here] for here in batch], size)
            self._device_batch = (self.dp_group.shard_rows(record_DB.reshape(-1)), options)
            self._batch = batch
        state_slot_B, options = self._device_batch
        rows = (state_slot_B, self._device_tables)
        self._kv_caches, x_BTXD, logits_BTV = model_steps.decode(
            self._model_def, self._weights, self._kv_caches, self._decode_state, rows, self.limits.batch_invariant
        )
        return self._sample(logits_BTV, (state_slot_B, None), options, x_BTXD)

    def _sample(self, logits_BTV, place, options, x_BTXD):
        """Sample tokens of the positions just computed, and propose the draft tokens that follow."""
        self._decode_state, drawn = model_steps.sample_tokens(
            self._model_def, logits_BTV, self._decode_state, place, *options, self.limits.batch_invariant
        )
        if self._kv_caches.mtp is not None:
            sampled, count_B = drawn
            mtp, self._decode_state = model_steps.propose_draft(
                self._model_def,
                self._weights,
                self._kv_caches.mtp,
                self._decode_state,
                x_BTXD,
                (sampled.token_B, count_B),
                place[0],
            )
            self._kv_caches = self._kv_caches._replace(mtp=mtp)
        return drawn

    def _collect(self, flight: InflightStep) -> list[SampledTokens]:
        results = self.dp_group.get((flight.finite, flight.first, flight.rows))
        drawn = []
        for device, plan in enumerate(flight.plans):
            if plan is not None:
                drawn += self._collect_device(device, plan, flight.size, *results)
        for id in [id for id, scheduler in self._scheduler_of.items() if id not in scheduler.requests]:
            del self._scheduler_of[id], self._sampling[id]
        return drawn

    def _collect_device(
        self, device: int, plan: SchedulerOutput, size: int, finite, first, rows
    ) -> list[SampledTokens]:
        """Commit the results of one device's plan and return its new tokens."""
        scheduler, drawn, failed = self.schedulers[device], [], []
        if read := plan.prefill:
            if not finite[device]:
                failed.append(read.request)
            if read.last or failed:
                sampled, row = (first[0], device) if read.last else (_NOT_FINITE, 0)
                drawn.append(SampledTokens(read.request.id, sampled, row, 1))
        for row, decode in enumerate(plan.decode, device * size):
            drawn.append(SampledTokens(decode.request.id, rows[0], row, int(rows[1][row])))
        alive = {id: s for id, s in scheduler.requests.items() if s.status not in _ENDED}
        drawn = [d for d in drawn if d.id in alive]
        failed += [alive[d.id] for d in drawn if not d.sampled.finite_B[d.row, : d.count].all()]
        for request in failed:
            self._fail(device, request)
        gained = {d.id: d.sampled.token_B[d.row, : d.count].tolist() for d in drawn}
        drawn = [d for d in drawn if not alive[d.id].is_replay]
        scheduler.update_from_output(plan, gained)
        return drawn

    def _fail(self, device: int, request: Request) -> None:
        """End a request with non-finite logits, and zero the blocks it wrote before others may get them."""
        state_slot_D = np.zeros(self.dp_group.count, np.int32)
        pages_DA = np.full((self.dp_group.count, self._table_width), -1, np.int32)
        state_slot_D[device] = request.state_slot
        pages_DA[device] = self._table(request)
        pages_DA[device, : request.num_cached_blocks] = -1
        if self.schedulers[device].fail_request(request.id):
            self._kv_caches = model_steps.zero_state(
                self._model_def, self._kv_caches, *self.dp_group.shard_rows((state_slot_D, pages_DA))
            )

    def stats(self) -> dict[str, float]:
        """Counts of requests, blocks and prefix hits, cache bytes (`allocate.memory_stats`) and tier counters,
        over all devices."""
        self._recover()
        tiers = {} if self.kv_connector is None else self.kv_connector.stats()
        return balance.merge_stats(self.schedulers) | allocate.memory_stats(self._kv_caches) | tiers


def chunk_sizes(longest: int) -> list[int]:
    """Ascending padded sizes of prompt chunks of up to `longest` tokens: 16, 64, ..., then quarters of `longest`.

    Few sizes mean few compiled programs; the quarters limit padding where it costs most.
    """
    sizes = {max(_LEAST_CHUNK, longest * quarters // 4) for quarters in (1, 2, 3, 4)}
    size = _LEAST_CHUNK
    while size < longest // 4:
        sizes.add(size)
        size *= 4
    return sorted(sizes)


def validate_limits(model: config.Model, limits: config.Serve, cache: config.Cache) -> None:
    """Raise UserError for limits that cannot be kept."""
    config.check_serving(model, limits, cache)
    allocate.validate_host_resident(model, limits, cache)
