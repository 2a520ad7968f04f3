"""`ModelRunner`: the arrays of one engine, and the dispatch of its jitted steps (`model_steps`).

The runner owns the weights, the KV caches, the decode state and the block tables. It runs a `SchedulerOutput`
and decides nothing. Only sampled tokens are copied to the host; block tables and sampling options are uploaded
only when they change.

On a mesh one step runs the plans of all devices, padded to the largest batch and chunk among them.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax import config
from v4jax.cache import allocate, weights_digest
from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.core.errors import UserError
from v4jax.models.quantize import quantize_model
from v4jax.models.transformer import Transformer
from v4jax.serve import model_steps
from v4jax.serve.data_parallel import DataParallelGroup
from v4jax.serve.kv_cache_sizes import kv_cache_sizes
from v4jax.serve.model_steps import DecodeState, KVCaches
from v4jax.serve.request import PrefillChunk, Request, SchedulerOutput
from v4jax.serve.sampler import (
    SamplerOutput,
    SamplingFlags,
    SamplingTensors,
    make_sampling_tensors,
    round_up_logprobs,
    token_counts,
)
from v4jax.serve.sampling_params import SamplingParams
from v4jax.serve.token_masks import TokenMasks

_LEAST_CHUNK = 16  # tokens
_PADDING = SamplingParams(temperature=0.0, seed=0)  # of a row that only fills up a batch
_log = logging.getLogger(__name__)


class Sampled(NamedTuple):
    """Tokens that one step sampled.

    output: arrays [B, T, ...]. count_B: int32 [B], the leading tokens of each row that are valid.
    """

    output: SamplerOutput
    count_B: jax.Array


class Computed(NamedTuple):
    """Logits of the rows that a step samples, and what sampling them takes.

    Attributes:
        logits_BTV: logits of the rows.
        place: see `model_steps.sample_tokens`.
        options: sampling options of the rows.
        x_BTXD: streams of the rows.
        requests: the rows that are no padding, {row: request}.
    """

    logits_BTV: jax.Array
    place: tuple
    options: tuple[SamplingTensors, SamplingFlags]
    x_BTXD: jax.Array
    requests: dict[int, Request]


class Forward(NamedTuple):
    """Results of a step before sampling; `ModelRunner.sample` makes a ModelRunnerOutput of them."""

    finite_D: jax.Array | None
    prompt_logprobs: tuple | None
    prefill: Computed | None
    decode: Computed | None
    rows_per_device: int

    @property
    def requests(self) -> list[Request]:
        """Requests of which a token is sampled."""
        return [request for rows in (self.prefill, self.decode) if rows for request in rows.requests.values()]


class ModelRunnerOutput(NamedTuple):
    """Results of one step, on the devices until `ModelRunner.get`.

    Attributes:
        finite_D: bool [devices], whether the prefill chunk of each device is finite; None without any chunk.
        prefill: tokens sampled after the last chunks of prompts, one row per device; None without any last chunk.
        decode: tokens of the decode rows, `rows_per_device` rows per device; None without any.
        rows_per_device: padded decode rows of each device.
        prompt_logprobs: log-probabilities of the tokens after each position of the chunks, arrays [devices, T, ...]
            (`model_steps.prefill_with_logprobs`); None unless the request of a chunk asks for them.
    """

    finite_D: jax.Array | None
    prefill: Sampled | None
    decode: Sampled | None
    rows_per_device: int
    prompt_logprobs: tuple | None = None


class ModelRunner:
    """Runs the steps of one model on the devices of one engine.

    Args:
        model: its weights are quantized and placed here as `limits` and `dp_group` say.
        limits, cache: sizes of each device.
        dp_group: the devices.

    Attributes:
        config: config of the model.
        kv_cache_spec: formats of the KV cache.
        cache_sizes: number of blocks and state slots of each device.
        chunk_sizes: padded sizes of prefill chunks, ascending.
        weights_digest: digest of the weights; None without prefix caching, because hashing takes time.
        weights: the arrays of the model.
        caches: the KV caches; every step that changes them donates the old arrays.
        decode_state: newest token, position and draft tokens of every state slot.
        block_tables: int32 [devices * (1 + max_num_seqs), table width], the blocks of every state slot; -1 means none.
    """

    def __init__(self, model: Transformer, limits: config.Serve, cache: config.Cache, dp_group: DataParallelGroup):
        if any(run.repeats > 1 for run in model.stack_specs):
            raise UserError("the engine cannot run layers that are held stacked; load the model with scan=False")
        self.config = model.config
        self._limits, self._dp_group = limits, dp_group
        if limits.quantization == "fp8":
            model = quantize_model(model)
        graphdef, variables = nnx.split(model)
        # A flat list of arrays, because JAX walks lists natively and nnx's trees in Python, every step.
        weights, tree = jax.tree.flatten(variables)
        self._model_def = model_steps.model_def(graphdef, tree, dp_group.sharding)
        self.weights = self._model_def.placed(weights)
        self.kv_cache_spec = KVCacheSpec(self.config, cache.kv_cache_dtype, cache.block_size, cache.kv_device_entries)
        self.cache_sizes = kv_cache_sizes(self.kv_cache_spec, limits, cache)
        block = self.kv_cache_spec.block_size
        self.chunk_sizes = [block] if limits.batch_invariant else chunk_sizes(limits.max_num_batched_tokens)
        self.weights_digest = weights_digest.weights_digest(variables) if cache.enable_prefix_caching else None
        self._layer_kinds = [[layer.attention for layer in run.pattern] for run in model.stack_specs]
        self.reset()
        if cache.kv_device_entries:
            _log.info(
                "cache: CSA entries of %s tokens in host memory (%s bytes), %s of a layer on the device",
                f"{(self.cache_sizes.num_blocks - 1) * block:,}",
                f"{self.memory_stats()['kv_host_used_bytes']:,}",
                f"{cache.kv_device_entries:,}",
            )

    @property
    def model(self) -> Transformer:
        """The model with the weights that the steps use."""
        return self._model_def.model(self.weights)

    def reset(self) -> None:
        """Allocate KV caches, decode state and block tables anew, all of them empty.

        A program that failed may have taken the old arrays, or left NaN in them.
        """
        self.caches = self.decode_state = self.block_tables = None  # free before allocating: both may not fit
        # (state slot, prompt tokens, sampling options) of the rows of the last decode step, by device
        self._batch: tuple = ()
        self._device_batch = None
        self._token_counts = None  # int32 [slots, V] by state slot, from the first request with a penalty on
        slots, k = self._limits.max_num_seqs, self._limits.num_speculative_tokens
        with jax.transfer_guard("allow"):
            layers = [[self._allocate_layer(kind) for kind in run] for run in self._layer_kinds]
            self.caches = KVCaches(layers, self._allocate_layer("swa") if k else None)
            decode_state = DecodeState(*(jnp.zeros((slots + 1, *shape), jnp.int32) for shape in ((), (), (k,))))
            self.decode_state = self._dp_group.replicate(decode_state)
        self._tables = np.full((self._dp_group.count, slots + 1, self.cache_sizes.table_width), -1, np.int32)
        self._upload_block_tables()

    def _allocate_layer(self, kind: str):
        sizes = self.cache_sizes
        layer = allocate.allocate_layer(self.kv_cache_spec, kind, sizes.num_blocks, sizes.num_state_slots, sizes.slack)
        return self._dp_group.replicate(layer)

    def memory_stats(self) -> dict[str, float]:
        """Bytes of the KV caches, and counters of the device entry cache (`allocate.memory_stats`)."""
        return allocate.memory_stats(self.caches)

    # --- steps -----------------------------------------------------------------------------------------------------

    def forward(self, plans: Sequence[SchedulerOutput | None], sampling: Mapping[Hashable, SamplingParams]) -> Forward:
        """Dispatch one step up to its logits and return at once; `sample` dispatches the rest.

        Args:
            plans: the plan of each device; None for a device without work. At least one is a plan.
            sampling: sampling options by request id.
        """
        self._copy_state([() if plan is None else plan.copies for plan in plans])
        self._set_block_tables([() if plan is None else plan.requests for plan in plans])
        finite_D, prompt_logprobs, prefill, decode = None, None, None, None
        chunks = [None if plan is None else plan.prefill for plan in plans]
        if any(chunks):
            finite_D, prompt_logprobs, prefill = self._prefill(chunks, sampling)
        rows = [[] if plan is None else [row.request for row in plan.decode] for plan in plans]
        size = min(1 << (max(map(len, rows)) - 1).bit_length(), self._limits.max_num_seqs)
        if any(rows):
            decode = self._decode(rows, size, sampling)
        return Forward(finite_D, prompt_logprobs, prefill, decode, size)

    def sample(self, forward: Forward, masks: TokenMasks | None = None) -> ModelRunnerOutput:
        """Dispatch the sampling of the newest step and return at once; `get` waits for the results.

        Args:
            forward: the result of the last call of `forward`.
            masks: the tokens that requests may sample; None restricts none.
        """
        prefill, decode = (rows and self._sample(rows, masks) for rows in (forward.prefill, forward.decode))
        return ModelRunnerOutput(forward.finite_D, prefill, decode, forward.rows_per_device, forward.prompt_logprobs)

    def get(self, output: ModelRunnerOutput) -> ModelRunnerOutput:
        """Wait for the results of a step and return them as numpy arrays, the rows of all devices."""
        arrays = (output.finite_D, output.prefill, output.decode, output.prompt_logprobs)
        finite_D, prefill, decode, prompt_logprobs = self._dp_group.get(arrays)
        return ModelRunnerOutput(finite_D, prefill, decode, output.rows_per_device, prompt_logprobs)

    def zero(self, device: int, state_slot: int, block_ids: Sequence[int]) -> None:
        """Zero a state slot and blocks of one device (see `model_steps.zero_state`)."""
        state_slot_D = np.zeros(self._dp_group.count, np.int32)
        blocks_DA = np.full((self._dp_group.count, self.cache_sizes.table_width), -1, np.int32)
        state_slot_D[device] = state_slot
        blocks_DA[device, : len(block_ids)] = block_ids
        self.caches = model_steps.zero_state(
            self._model_def, self.caches, *self._dp_group.shard_rows((state_slot_D, blocks_DA))
        )

    def _copy_state(self, copies: list[Sequence[tuple[int, int]]]) -> None:
        """Copy state slots: pairs (source, target) of each device."""
        for pairs in zip_longest(*copies, fillvalue=(0, 0)):
            source_D, target_D = np.array(pairs, np.int32).T.copy()
            self.caches = model_steps.copy_state(
                self._model_def, self.caches, *self._dp_group.shard_rows((source_D, target_D))
            )

    def _set_block_tables(self, requests: list[Sequence[Request]]) -> None:
        changed = False
        for device, here in enumerate(requests):
            for request in here:
                row = self._block_table(request)
                if not np.array_equal(row, self._tables[device, request.state_slot]):
                    self._tables[device, request.state_slot] = row
                    changed = True
        if changed:
            self._upload_block_tables()

    def _upload_block_tables(self) -> None:
        self.block_tables = self._dp_group.shard_rows(self._tables.reshape(-1, self._tables.shape[-1]).copy())

    def _block_table(self, request: Request) -> np.ndarray:
        row = np.full(self.cache_sizes.table_width, -1, np.int32)
        row[: len(request.block_ids)] = request.block_ids
        return row

    def _prefill(
        self, chunks: list[PrefillChunk | None], sampling: Mapping[Hashable, SamplingParams]
    ) -> tuple[jax.Array, tuple | None, Computed | None]:
        """Prefill one chunk per device that has one; a prompt's last chunk gives logits."""
        longest = max(chunk.count for chunk in chunks if chunk)
        size = next(size for size in self.chunk_sizes if size >= longest)
        tokens_DT = np.zeros((len(chunks), size + 1), np.int32)
        scalars_3D = np.zeros((3, len(chunks)), np.int32)  # start, count, state slot
        for device, chunk in enumerate(chunks):
            if chunk:
                known = chunk.request.tokens[chunk.start : chunk.start + chunk.count + 1]
                tokens_DT[device, : len(known)] = known
                scalars_3D[:, device] = chunk.start, chunk.count, chunk.request.state_slot
        scored = [sampling[chunk.request.id].prompt_logprobs for chunk in chunks if chunk]
        scored = [count for count in scored if count is not None]
        step, more = model_steps.prefill, ()
        if scored:
            step, more = model_steps.prefill_with_logprobs, (round_up_logprobs(max(scored)),)
        self.caches, x_D1XD, finite_D, *prompt_logprobs = step(
            self._model_def,
            self.weights,
            self.caches,
            *self._dp_group.shard_rows((tokens_DT, *scalars_3D)),
            self.block_tables,
            *more,
        )
        prompt_logprobs = prompt_logprobs[0] if scored else None
        last = [chunk if chunk and chunk.last else None for chunk in chunks]
        if not any(last):
            return finite_D, prompt_logprobs, None
        slots_positions = [(chunk.request.state_slot, chunk.start + chunk.count) if chunk else (0, 0) for chunk in last]
        state_slot_D, position_D = np.array(slots_positions, np.int32).T.copy()
        requests = {device: chunk.request for device, chunk in enumerate(last) if chunk}
        rows = [[(len(r.prompt), sampling[r.id])] if (r := requests.get(d)) else [] for d in range(len(last))]
        self._count_known_tokens(requests, sampling)
        logits_DTV = model_steps.logits(self._model_def, self.weights, x_D1XD)
        place = self._dp_group.shard_rows((state_slot_D, position_D))
        prefill = Computed(logits_DTV, place, self._sampling_tensors(rows, 1), x_D1XD, requests)
        return finite_D, prompt_logprobs, prefill

    def _count_known_tokens(self, requests: dict[int, Request], sampling: Mapping[Hashable, SamplingParams]) -> None:
        """Set the token counts of requests with penalties, {device: request}, to their known tokens."""
        penalized = {device: r for device, r in requests.items() if sampling[r.id].penalized}
        if not penalized:
            return
        D, V = self._dp_group.count, self.config.vocab_size
        if self._token_counts is None:
            with jax.transfer_guard("allow"):
                counts_ZV = jnp.zeros((self._limits.max_num_seqs + 1, V), jnp.int32)
                self._token_counts = self._dp_group.replicate(counts_ZV)
        state_slot_D, count_DV = np.zeros(D, np.int32), np.zeros((D, V), np.int32)
        for device, request in penalized.items():
            state_slot_D[device] = request.state_slot
            count_DV[device] = token_counts(request.prompt, request.tokens[len(request.prompt) :], V)
        self._token_counts = model_steps.set_token_counts(
            self._model_def, self._token_counts, *self._dp_group.shard_rows((state_slot_D, count_DV))
        )

    def _decode(self, rows: list[list[Request]], size: int, sampling: Mapping[Hashable, SamplingParams]) -> Computed:
        """Decode the rows of each device, padded to `size` rows per device."""
        batch = tuple(tuple((r.state_slot, len(r.prompt), sampling[r.id]) for r in here) for here in rows)
        if batch != self._batch:
            slot_DB = np.zeros((len(rows), size), np.int32)
            for device, here in enumerate(batch):
                slot_DB[device, : len(here)] = [slot for slot, *_ in here]
            options = self._sampling_tensors([[row[1:] for row in here] for here in batch], size)
            self._device_batch = (self._dp_group.shard_rows(slot_DB.reshape(-1)), options)
            self._batch = batch
        state_slot_B, options = self._device_batch
        self.caches, x_BTXD, logits_BTV = model_steps.decode(
            self._model_def,
            self.weights,
            self.caches,
            self.decode_state,
            (state_slot_B, self.block_tables),
            self._limits.batch_invariant,
        )
        requests = {device * size + row: r for device, here in enumerate(rows) for row, r in enumerate(here)}
        return Computed(logits_BTV, (state_slot_B, None), options, x_BTXD, requests)

    def _sampling_tensors(
        self, rows: list[list[tuple[int, SamplingParams]]], size: int
    ) -> tuple[SamplingTensors, SamplingFlags]:
        """Build the sampling options of (prompt tokens, params), padded to `size` rows per device."""
        padded = [row for here in rows for row in [*here, *[(0, _PADDING)] * (size - len(here))]]
        options, flags = make_sampling_tensors([params for _, params in padded], [length for length, _ in padded])
        return self._dp_group.shard_rows(options), flags

    def _sample(self, rows: Computed, masks: TokenMasks | None) -> Sampled:
        """Sample tokens of the positions just computed, and propose the draft tokens that follow."""
        logits_BTV, place, options, x_BTXD, requests = rows
        penalized = options[0].penalty_B3 is not None
        mask_BW = masks and masks.fill(requests, len(logits_BTV), self.config.vocab_size)
        self.decode_state, sampled = model_steps.sample_tokens(
            self._model_def,
            logits_BTV,
            self.decode_state,
            place,
            *options,
            self._limits.batch_invariant,
            self._token_counts if penalized else None,
            None if mask_BW is None else self._dp_group.shard_rows(mask_BW),
        )
        output, count_B = sampled
        if penalized:
            self._token_counts = model_steps.count_tokens(
                self._model_def, self._token_counts, place[0], output.token_B, count_B
            )
        if self.caches.mtp is not None:
            mtp, self.decode_state = model_steps.propose_draft(
                self._model_def,
                self.weights,
                self.caches.mtp,
                self.decode_state,
                x_BTXD,
                (output.token_B, count_B),
                place[0],
            )
            self.caches = self.caches._replace(mtp=mtp)
        return Sampled(output, count_B)


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
