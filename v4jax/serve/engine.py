"""The engine: runs many requests through one model at once, over the paged KV cache.

Every `step` asks the scheduler for a plan (one prefill chunk, and one decode step of every running request), dispatches
it to the device (`model_runner.ModelRunner`), and then collects the results of the plan before. The device computes
while the host turns tokens into text.

If a request in a plan has token masks (`token_masks`), the plan's forward is dispatched as always, but its sampling
only after the results of the plan before have been collected. The device computes the forward meanwhile.

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
from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from v4jax import config
from v4jax.cache import allocate, block_hash
from v4jax.cache.block_pool import BlockPool
from v4jax.cache.offload.manager import FLUSH_SECONDS
from v4jax.core.errors import UserError
from v4jax.models.transformer import Transformer
from v4jax.serve import balance, data_parallel, offload_connector
from v4jax.serve.kv_cache_sizes import check_enough_memory
from v4jax.serve.model_runner import ModelRunner, ModelRunnerOutput
from v4jax.serve.request import PrefillChunk, Request, RequestStatus, SchedulerOutput
from v4jax.serve.sampler import SamplerOutput
from v4jax.serve.sampling_params import SamplingParams
from v4jax.serve.scheduler import Scheduler
from v4jax.serve.token_masks import TokenMask, TokenMasks

_ENDED = (RequestStatus.FINISHED, RequestStatus.ABORTED, RequestStatus.ERROR)
_log = logging.getLogger(__name__)

_NOT_FINITE = SamplerOutput(np.zeros((1, 1), np.int32), np.zeros((1, 1), bool))  # for a non-finite chunk


class SampledTokens(NamedTuple):
    """New tokens of one request: the first `count` positions of row `row` of `sampled` (numpy arrays).

    num_cached_tokens: tokens of its prompt that were found in the prefix cache.
    prompt_logprobs: with the first token, log-probabilities of its prompt tokens but the first, and possibly of tokens
        after the prompt (`sampler.logprobs`, [T], [T], [T, K], [T, K]); None unless the request asks for them.
    error: why the request has ended without these tokens; None if it has not.
    """

    id: Hashable
    sampled: SamplerOutput
    row: int
    count: int
    num_cached_tokens: int
    prompt_logprobs: tuple[np.ndarray, ...] | None = None
    error: str | None = None


class InflightStep(NamedTuple):
    """One dispatched step: the plan of each device, and results that are still on the devices."""

    plans: list[SchedulerOutput | None]
    output: ModelRunnerOutput


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

    Attributes:
        model: config of the model.
        model_runner: weights, KV caches and jitted steps.
        schedulers: one per device.
        kv_connector: the offload tiers; None without tiers, and after `close`.
        hash_seed: seed of the block hashes of requests without a salt; None without prefix caching.
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
        self.schedulers: list[Scheduler] = []
        self._forget()
        self.broken = False
        self.model_runner = ModelRunner(model, limits, cache, self.dp_group)
        self.kv_cache_spec = self.model_runner.kv_cache_spec
        self.hash_seed = self._hash_seed()
        self.kv_connector = offload_connector.build(self.model_runner.caches, self.dp_group, cache, self.kv_cache_spec)
        self.schedulers = [self._new_scheduler(rank, cache) for rank in range(self.dp_group.count)]

    def _hash_seed(self) -> bytes | None:
        """Hash everything but the tokens that block contents depend on; None without prefix caching."""
        if self.model_runner.weights_digest is None:
            return None
        # Batch invariance promises equal bits, so only blocks computed by the same programs may be reused.
        bits = (jax.__version__, jax.default_backend()) if self.limits.batch_invariant else ()
        spec = self.kv_cache_spec
        return block_hash.hash_seed(
            self.model_runner.weights_digest, self.model, spec.kv_cache_dtype, spec.block_size, *bits
        )

    def _new_scheduler(self, rank: int, cache: config.Cache) -> Scheduler:
        sizes, slots = self.model_runner.cache_sizes, self.limits.max_num_seqs
        block = self.kv_cache_spec.block_size
        return Scheduler(
            BlockPool(sizes.num_blocks, range(1 + slots, sizes.num_state_slots)),
            slots,
            block,
            block if self.limits.batch_invariant else self.limits.max_num_batched_tokens,
            snapshot_interval_blocks=cache.snapshot_interval_blocks,
            lookahead=self.limits.num_speculative_tokens,
            replay=self.limits.batch_invariant,
            kv_connector=self.kv_connector and self.kv_connector.device_connectors[rank],
        )

    def reset(self) -> None:
        """Drop all requests and the device's cache; the offload tiers keep their blocks."""
        self.broken = True
        self._forget()
        self.model_runner.reset()
        self.broken = False

    def _forget(self) -> None:
        """Reset the host state of all requests and schedulers."""
        self._scheduler_of: dict[Hashable, Scheduler] = {}
        self._sampling: dict[Hashable, SamplingParams] = {}
        self._masks = TokenMasks()
        self._prompt_logprobs: dict[Hashable, list[tuple[np.ndarray, ...]]] = {}  # of the chunks read so far
        self._inflight: deque[InflightStep] = deque()
        for scheduler in self.schedulers:
            scheduler.reset()

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
        biased = [i for i, _ in sampling.logit_bias]
        for option, ids in [("allowed_token_ids", sampling.allowed_token_ids or ()), ("logit_bias", biased)]:
            if ids and max(ids) >= self.model.vocab_size:
                raise UserError(
                    f"{name} has {max(ids)} in its {option}; the model's ids are 0 to {self.model.vocab_size - 1}"
                )
        for option in ("structured_outputs", "bad_words"):
            if getattr(sampling, option) and self.limits.num_speculative_tokens:
                raise UserError(f"{name} has {option}, which need an LLM without num_speculative_tokens")
        self.schedulers[0].check_fits(len(prompt), sampling.max_tokens)

    def add_request(
        self,
        id: Hashable,
        prompt: list[int],
        sampling: SamplingParams,
        cache_salt: str | None = None,
        extra_keys: Sequence[block_hash.ExtraKey] = (),
        *,
        stop_ids: Collection[int] = (),
        masks: Sequence[TokenMask] = (),
    ) -> None:
        """Queue a request that `check` accepted. Its `n` is not looked at.

        Args:
            id: unique among the current requests.
            prompt: token ids.
            sampling: sampling options.
            cache_salt: the request shares blocks only with requests of the same salt; None is a salt of its own.
            extra_keys: what the token ids do not tell, such as images; blocks are shared only where it is equal.
            stop_ids: ids, beside its `stop_token_ids`, that are not sampled before its `min_tokens`.
            masks: masks of the tokens that it may sample.

        Raises:
            ValueError: the id is in use.
        """
        self._recover()
        if id in self._scheduler_of and id in self._scheduler_of[id].requests:
            raise ValueError(f"request {id!r} is in use")
        if sampling.min_tokens:
            stop_ids = tuple(sorted({*stop_ids, *sampling.stop_token_ids}))
            sampling = dataclasses.replace(sampling, stop_token_ids=stop_ids)
        self._add(id, prompt, sampling, cache_salt or "", extra_keys)
        self._masks.add(id, masks)

    @_reset_on_error
    def _add(
        self,
        id: Hashable,
        prompt: list[int],
        sampling: SamplingParams,
        salt: str,
        extra_keys: Sequence[block_hash.ExtraKey],
    ) -> None:
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(64))
        seed = self.hash_seed and block_hash.hash_seed(self.hash_seed, salt=salt)
        if sampling.prompt_logprobs is not None:
            seed = None  # every token of its prompt has to be computed
        num_offloaded = self.kv_connector and self.kv_connector.num_offloaded_blocks
        scheduler = balance.select_scheduler(
            self.schedulers, prompt, sampling.max_tokens, seed, num_offloaded, extra_keys
        )
        scheduler.add_request(
            id, prompt, sampling.max_tokens, seed=seed, extra_keys=extra_keys, priority=sampling.priority
        )
        self._scheduler_of[id] = scheduler
        self._sampling[id] = sampling

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
        forward = self.model_runner.forward(plans, self._sampling) if any_plan else None
        masked = forward is not None and any(request.id in self._masks for request in forward.requests)
        if forward is not None and not masked:
            self._inflight.append(InflightStep(plans, self.model_runner.sample(forward)))
        drawn = self._collect(self._inflight.popleft()) if len(self._inflight) > (any_plan and not masked) else []
        if masked:  # the tokens just collected decide which ones may follow
            self._inflight.append(InflightStep(plans, self.model_runner.sample(forward, self._masks)))
        if not self._has_work:
            self._run_offload()
        return drawn

    def _run_offload(self, waits: bool = False) -> None:
        """Copy blocks between device and offload tiers, as the schedulers' block pools require."""
        if self.kv_connector is not None:
            runner = self.model_runner
            runner.caches = self.kv_connector.run_transfers(runner.caches, idle=not self._has_work)
            if waits:
                self.kv_connector.wait_for_load()

    def close(self, seconds: float = FLUSH_SECONDS) -> None:
        """Store idle blocks in the offload tiers within `seconds`, then detach from the tiers permanently."""
        if self.kv_connector is not None:
            if self.broken:
                self._forget()
            self.kv_connector.close(self.model_runner.caches, seconds)
            self.kv_connector = None
            for scheduler in self.schedulers:
                scheduler.kv_connector = scheduler.block_pool.on_idle = None

    def _collect(self, flight: InflightStep) -> list[SampledTokens]:
        """Wait for the results of a step, commit them and return the new tokens."""
        output = self.model_runner.get(flight.output)
        drawn = []
        for device, plan in enumerate(flight.plans):
            if plan is not None:
                drawn += self._collect_device(device, plan, output)
        for id in [id for id, scheduler in self._scheduler_of.items() if id not in scheduler.requests]:
            del self._scheduler_of[id], self._sampling[id]
            self._masks.remove(id)
            self._prompt_logprobs.pop(id, None)
        return drawn

    def _collect_device(self, device: int, plan: SchedulerOutput, output: ModelRunnerOutput) -> list[SampledTokens]:
        """Commit the results of one device's plan and return its new tokens."""
        scheduler, drawn, failed = self.schedulers[device], [], []
        if chunk := plan.prefill:
            request = chunk.request
            if not output.finite_D[device]:
                failed.append(request)
            prompt_logprobs = self._collect_prompt_logprobs(device, chunk, output)
            if chunk.last or failed:
                sampled, row = (output.prefill.output, device) if chunk.last else (_NOT_FINITE, 0)
                drawn.append(SampledTokens(request.id, sampled, row, 1, request.num_cached_tokens, prompt_logprobs))
        for row, (request, _) in enumerate(plan.decode, device * output.rows_per_device):
            sampled, count_B = output.decode
            drawn.append(SampledTokens(request.id, sampled, row, int(count_B[row]), request.num_cached_tokens))
        alive = {id: s for id, s in scheduler.requests.items() if s.status not in _ENDED}
        drawn = [d._replace(error=self._masks.errors.get(d.id)) for d in drawn if d.id in alive]
        failed += [alive[d.id] for d in drawn if not d.sampled.finite_B[d.row, : d.count].all()]
        for request in failed:
            self._fail(device, request)
        gained = {d.id: d.sampled.token_B[d.row, : d.count].tolist() for d in drawn}
        drawn = [d for d in drawn if not alive[d.id].is_replay]
        for one in drawn:
            if one.error is not None:
                scheduler.abort_request(one.id)
        scheduler.update_from_output(plan, gained)
        return drawn

    def _collect_prompt_logprobs(
        self, device: int, chunk: PrefillChunk, output: ModelRunnerOutput
    ) -> tuple[np.ndarray, ...] | None:
        """Keep the log-probabilities of a chunk; return those of all chunks after the last one."""
        sampling = self._sampling.get(chunk.request.id)
        if output.prompt_logprobs is None or sampling is None or sampling.prompt_logprobs is None:
            return None
        if chunk.start == 0:
            self._prompt_logprobs[chunk.request.id] = []
        chunks = self._prompt_logprobs[chunk.request.id]
        chunks.append(tuple(array[device, : chunk.count] for array in output.prompt_logprobs))
        return tuple(map(np.concatenate, zip(*chunks, strict=True))) if chunk.last else None

    def _fail(self, device: int, request: Request) -> None:
        """End a request with non-finite logits, and zero the blocks it wrote before others may get them."""
        state_slot, written = request.state_slot, request.block_ids[request.num_cached_blocks :]
        if self.schedulers[device].fail_request(request.id):
            self.model_runner.zero(device, state_slot, written)

    def stats(self) -> dict[str, float]:
        """Counts of requests, blocks and prefix hits, cache bytes (`allocate.memory_stats`) and tier counters,
        over all devices."""
        self._recover()
        tiers = {} if self.kv_connector is None else self.kv_connector.stats()
        return balance.merge_stats(self.schedulers) | self.model_runner.memory_stats() | tiers


def validate_limits(model: config.Model, limits: config.Serve, cache: config.Cache) -> None:
    """Raise UserError for limits that cannot be kept."""
    config.check_serving(model, limits, cache)
    allocate.validate_host_resident(model, limits, cache)
