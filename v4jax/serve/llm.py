"""`LLM`: text generation with one model, its tokenizer and an engine, under vLLM's names."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Sequence

from v4jax import checkpoint, config
from v4jax.cache.offload.manager import FLUSH_SECONDS
from v4jax.checkpoint.generation_config import GENERATION_NAME, GenerationConfig, read_generation_config
from v4jax.core.errors import UserError, suggest
from v4jax.data.chat.encoder import ChatEncoder
from v4jax.data.tokenizer import Tokenizer, load_tokenizer
from v4jax.models.transformer import Transformer
from v4jax.serve import data_parallel
from v4jax.serve import prompts as prompt_forms
from v4jax.serve.engine import Engine, validate_limits
from v4jax.serve.engine_loop import EngineLoop
from v4jax.serve.kv_cache_sizes import check_enough_memory
from v4jax.serve.output_processor import OutputProcessor, RequestState
from v4jax.serve.outputs import RequestOutput
from v4jax.serve.prompts import Parsed, Prompt
from v4jax.serve.sampling_params import SamplingParams, is_int, short_repr
from v4jax.serve.stop_tokens import find_ends, warn_of_bos
from v4jax.serve.structured_outputs import GrammarCompiler
from v4jax.serve.token_masks import BadWords, TokenMask

_log = logging.getLogger(__name__)


class LLM:
    """Generates text with one model.

    Threads: any number of threads may call an LLM, and their requests share the batch. The LLM computes in a thread of
    its own, so JAX settings of the caller's thread (context managers) do not apply; use `jax.config.update` instead.
    An exception in a step reaches every caller whose requests were running. The LLM stays usable afterwards, with an
    empty device cache. An interrupt (Ctrl-C) ends only the call that receives it.

    Several processes: all processes must make the same calls, and all get the same results. The caller's thread
    computes, only one thread may call, and after an exception the LLM is unusable.

    Args:
        model: a directory (a run, an orbax checkpoint or Hugging Face weights) or a Transformer.
        tokenizer: a Tokenizer or the path of a tokenizer.json. None means the tokenizer of the directory. Without a
            tokenizer, prompts must be token ids.
        dtype: "float32" or "bfloat16"; allowed only if `model` is a directory.
        mesh: a MeshConfig, such as MeshConfig("serve"), over all devices of all processes. It shards the experts over
            the devices. Every device has its own batch and its own KV cache, of the sizes given in `options`. None
            means one device.
        bos_id: the only id put before a text prompt. None means the ids that the post-processor of tokenizer.json
            adds, as in transformers.
        eos_id: the id or ids that end a text. None means the ids of the checkpoint (`stop_tokens.find_ends`).
        parse_special_tokens: encode special tokens in prompts, such as "<eos>", as those tokens. By default they are
            plain text, and the first prompt that contains one logs a warning.
        **options: fields of `config.Serve` and `config.Cache`, such as max_num_seqs, max_model_len,
            quantization="fp8", kv_cache_dtype="fp8", block_size or kv_host_bytes. Fields that are not given come from
            the checkpoint's config.

    Attributes:
        engine, engine_loop, output_processor: the parts that a server uses with `make_requests`: `engine_loop.submit`
            and `engine_loop.generate` run a request and stream its outputs.
        default_sampling_params: the sampling options that generation_config.json sets. They apply where no
            SamplingParams are passed, as in vLLM.

    Raises:
        UserError: an argument or an option is invalid.
    """

    def __init__(
        self,
        model: str | os.PathLike | Transformer,
        *,
        tokenizer: Tokenizer | str | os.PathLike | None = None,
        dtype: str | None = None,
        mesh: config.Mesh | None = None,
        bos_id: int | None = None,
        eos_id: int | Sequence[int] | None = None,
        parse_special_tokens: bool = False,
        **options,
    ):
        _check_types(model, tokenizer, mesh)
        generation = GenerationConfig()
        if isinstance(model, Transformer):
            stored = config.Config(model=model.config)
            if dtype is not None:
                raise UserError("dtype applies when a checkpoint is read; give a directory, or a model of that dtype")
        else:
            stored, generation = checkpoint.load_config(model), read_generation_config(model)
            tokenizer = load_tokenizer(model, stored.model) if tokenizer is None else tokenizer
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = Tokenizer(tokenizer, model=stored.model)
        size = stored.model.vocab_size
        if bos_id is not None and (not is_int(bos_id) or not 0 <= bos_id < size):
            raise UserError(f"bos_id is {short_repr(bos_id)}; the model's ids are 0 to {size - 1}")
        self.default_sampling_params = generation.sampling
        self._check_defaults()
        self._bos_id, self._parses, self._warned = bos_id, parse_special_tokens, False
        self._directory = None if isinstance(model, Transformer) else model
        ends = find_ends(stored.model, generation, tokenizer, eos_id)
        if bos_id is None:
            warn_of_bos(stored.model, tokenizer)
        serve, cache = _engine_config(stored, options)
        validate_limits(stored.model, serve, cache)
        on = data_parallel.data_parallel_group(mesh)
        data_parallel.validate_engine(on, stored.model, serve, cache)
        check_enough_memory(stored.model, serve, cache, on)
        if not isinstance(model, Transformer):  # last: reading weights may take minutes
            model = checkpoint.load(model, dtype=dtype, quantization=serve.quantization, placement=on.placement)
        self.tokenizer, self.engine = tokenizer, Engine(model, serve, cache, on)
        self._description = f"{model!r}, max_num_seqs={serve.max_num_seqs}, max_model_len={serve.max_model_len}"
        self._ends = ends
        self.output_processor = OutputProcessor(tokenizer, ends)
        self.engine_loop = EngineLoop(self.engine)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate one continuation of every prompt, or `SamplingParams.n`.

        Args:
            prompts: a string, a list of token ids, {"prompt": "..."} or {"prompt_token_ids": [...]}, or a list of
                these. A dict may hold a "cache_salt", a string: cached blocks are shared only between prompts of the
                same salt. A string is encoded as the beginning of a document (see `LLM`, `bos_id`). The number of
                prompts is not limited: prompts join and leave the running batch as it has room.
            sampling_params: one SamplingParams for all prompts, or a list with one for each prompt. None means
                `get_default_sampling_params()`.

        Returns:
            One RequestOutput per prompt, in the order of the prompts. A request whose logits are not finite ends with
            finish_reason "error"; the other requests are not affected.

        Raises:
            UserError: a request is invalid. It is raised before any request runs.
        """
        requests = self.make_requests(prompts, sampling_params)
        for _ in self.engine_loop.run(requests):
            pass
        return [request.output() for request in requests]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, str]]:
        """Generate like `generate`, and yield text as it is generated.

        Closing the iterator cancels its requests.

        Args:
            prompts, sampling_params: as for `generate`.

        Yields:
            (index of the prompt, piece of its text). A piece never ends inside a character or inside a possible stop
            string. The pieces of one prompt concatenate to its text.

        Raises:
            UserError: there is no tokenizer, or a request is invalid or has several continuations (both before any
                request runs), or a request ended with an error (after the last piece of all prompts).
        """
        self._need_tokenizer("streaming text")
        requests = self.make_requests(prompts, sampling_params)
        for index, request in enumerate(requests):
            if request.sampling.n > 1:
                raise UserError(f"prompt {index} has n={request.sampling.n}; LLM.stream yields one continuation")
        return self._stream(requests)

    def chat(
        self,
        messages: Sequence[dict] | Sequence[Sequence[dict]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        **options,
    ) -> list[RequestOutput]:
        """Generate the reply to a conversation, or to each of several ones.

        Args:
            messages: messages of a conversation, {"role": "user", "content": "..."}, or a list of conversations.
            sampling_params: as for `generate`.
            add_generation_prompt: end the prompt with the beginning of the reply.
            **options: options of `ChatEncoder.conversation`, such as tools, thinking and reasoning_effort.

        Returns:
            One RequestOutput per conversation. Its text is the reply as the model writes it;
            `chat_encoder.decoder` separates reasoning, content and tool calls.

        Raises:
            UserError: there is no tokenizer, or a conversation or a request is invalid.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise UserError(f"messages are {short_repr(messages)}; give a list of messages, or a list of such lists")
        conversations = [messages] if isinstance(messages[0], dict) else messages
        prompts = [
            {"prompt_token_ids": self.chat_encoder.encode(each, add_generation_prompt=add_generation_prompt, **options)}
            for each in conversations
        ]
        return self.generate(prompts, sampling_params)

    @functools.cached_property
    def chat_encoder(self) -> ChatEncoder:
        """Encoder of conversations: the chat template of the checkpoint's directory, else DeepSeek's encoding.

        Raises:
            UserError: there is no tokenizer, or the chat template cannot be read.
        """
        self._need_tokenizer("a chat")
        if self._directory is None:
            return ChatEncoder(self.tokenizer)
        return ChatEncoder.from_dir(self._directory, self.tokenizer)

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the SamplingParams of `default_sampling_params`, the options that generation_config.json sets."""
        return SamplingParams(**self.default_sampling_params)

    def stats(self) -> dict[str, float]:
        """Return the counters and gauges of the engine, between two of its steps.

        Names are vLLM's where it has one. Always: num_requests_waiting, num_requests_running, num_preemptions,
        kv_cache_usage_perc (a fraction), num_blocks_* and num_snapshots_* (KV blocks and state snapshots by state),
        prefix_cache_queries and prefix_cache_hits (tokens), prompt_tokens and generation_tokens (of all requests since
        the start), kv_device_used_bytes and kv_host_used_bytes (arrays of the KV cache on the devices and in host
        memory).

        With num_speculative_tokens: spec_decode_num_drafts is the number of decode steps, summed over requests;
        spec_decode_num_draft_tokens and spec_decode_num_accepted_tokens are the tokens proposed and accepted in them.

        With CSA entries in host memory (`cache.kv_device_entries`): device_entry_cache_hits and
        device_entry_cache_misses count the top-k entries of decode steps, summed over layers, that were on the device
        and that were fetched from the host. device_entry_cache_hit_rate is the fraction of hits,
        device_entry_cache_fetched_bytes the bytes fetched.

        With offload tiers: host_* and disk_* report blocks, state snapshots and bytes stored in the tier, hits and
        misses of both, bytes moved, evictions, corrupt items, errors and the state of the circuit breaker. queue_*
        report the items queued between the tiers.
        """
        return self.engine_loop.do(lambda: self.engine.stats() | self.output_processor.stats())

    @property
    def cache_summary(self) -> str:
        """Capacity of the KV cache on device, host and disk, in tokens, as text; "" without offload tiers."""
        connector = self.engine.kv_connector
        return "" if connector is None else connector.summary

    def close(self, seconds: float | None = None) -> None:
        """Offload the idle blocks to the tiers, if there are any, and release the disk tier's directory.

        Requests that run in other threads end with a UserError, and so does every later request. Without this call,
        the end of the process stores the idle blocks. If the LLM is garbage collected before, copies that are already
        queued are stored, but idle blocks that were not yet copied off the device are lost. A crash loses both.

        Args:
            seconds: maximum wait; None waits for the current step without limit (`EngineLoop.close`).
        """
        self.engine_loop.close(seconds)

    def __repr__(self) -> str:
        return f"LLM({self._description})"

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        if kind is None or issubclass(kind, Exception):
            self.close()
        else:  # an interrupt must not wait for a step that is still being compiled
            self.engine_loop.close(FLUSH_SECONDS if self.cache_summary else 0.0)

    def _stream(self, requests: list[RequestState]) -> Iterator[tuple[int, str]]:
        for index, output in self.engine_loop.run(requests, stream=True):
            if output.text:
                yield index, output.text
        for index, request in enumerate(requests):
            if request.error:
                raise UserError(f"prompt {index} was stopped: {request.error}")

    def make_requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestState]:
        """Encode and check prompts, and return one request for each, which `engine_loop` can run once.

        Args:
            prompts, sampling_params: as for `generate`.

        Raises:
            UserError: a request is invalid.
        """
        parsed = prompt_forms.parse(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(parsed)
        if not isinstance(sampling_params, Sequence) or not all(isinstance(p, SamplingParams) for p in sampling_params):
            got = short_repr(sampling_params)
            raise UserError(f"sampling_params must be one SamplingParams or a list of them, got {got}")
        if len(sampling_params) != len(parsed):
            raise UserError(f"{len(sampling_params)} sampling_params for {len(parsed)} prompts; give one, or one each")
        pairs = zip(parsed, sampling_params, strict=True)
        return [self._make_request(f"prompt {i}", *pair) for i, pair in enumerate(pairs)]

    def _make_request(self, name: str, prompt: Parsed, sampling: SamplingParams) -> RequestState:
        if sampling.stop:
            self._need_tokenizer(f"{name} uses stop strings, which")
        ids, size = self._ids(name, prompt), self.engine.model.vocab_size
        if bad := [i for i in sampling.stop_token_ids if i >= size]:
            raise UserError(f"{name} has {bad[0]} among its stop_token_ids; the model's ids are 0 to {size - 1}")
        if sampling.max_tokens == self.default_sampling_params.get("max_tokens"):  # a default is only an upper bound
            room = max(1, self.engine.limits.max_model_len - len(ids))
            sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, room))
        self.engine.check(ids, sampling, name)
        masks = self._masks(name, sampling)
        return self.output_processor.new_request(prompt.text, ids, sampling, prompt.cache_salt, masks=masks)

    def _masks(self, name: str, sampling: SamplingParams) -> list[list[TokenMask]]:
        """Return the token masks of each continuation."""
        masks: list[list[TokenMask]] = [[] for _ in range(sampling.n)]
        if sampling.structured_outputs is not None:
            self._need_tokenizer(f"{name} has structured_outputs, which")
            try:
                grammars = self._grammar_compiler.masks(sampling.structured_outputs, sampling.n)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
            for own, grammar in zip(masks, grammars, strict=True):
                own.append(grammar)
        if sampling.bad_words:
            self._need_tokenizer(f"{name} has bad_words, which")
            bad_words = BadWords(self.tokenizer, sampling.bad_words)
            for own in masks:
                own.append(bad_words)
        return masks

    @functools.cached_property
    def _grammar_compiler(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.engine.model.vocab_size, self._ends)

    def _ids(self, name: str, prompt: Parsed) -> list[int]:
        """Return the token ids of a prompt, encoded from its text if it was not given as ids; may be empty."""
        if prompt.ids is not None:
            return prompt.ids
        self._need_tokenizer(f"{name} is text, which")
        if not self._parses and not self._warned and (found := self.tokenizer.special_tokens_in(prompt.text)):
            self._warned = True
            _log.warning(
                "%s holds %s, read as plain text; pass parse_special_tokens=True to LLM to have special tokens",
                name,
                ", ".join(map(repr, found[:3])) + (", ..." if len(found) > 3 else ""),
            )
        ids = self.tokenizer.encode_document(
            prompt.text, add_special_tokens=self._bos_id is None, parse_special_tokens=self._parses
        )
        return ids if self._bos_id is None else [self._bos_id, *ids]

    def _check_defaults(self) -> None:
        try:
            self.get_default_sampling_params()
        except UserError as error:
            raise UserError(f"{GENERATION_NAME}: {error}; mend the file, or remove the field from it") from None

    def _need_tokenizer(self, what: str) -> None:
        if self.tokenizer is None:
            raise UserError(f"{what} needs a tokenizer; put tokenizer.json into the checkpoint or pass tokenizer=")


def _check_types(model, tokenizer, mesh) -> None:
    """Raise UserError for an argument of `LLM` that has the wrong type."""
    path = (str, os.PathLike)
    for name, value, kinds, cure in [
        ("model", model, (*path, Transformer), "a checkpoint's directory or a Transformer"),
        ("tokenizer", tokenizer, (*path, Tokenizer, type(None)), "a v4jax Tokenizer or the path of a tokenizer.json"),
        ("mesh", mesh, (config.Mesh, type(None)), "a MeshConfig"),
    ]:
        if not isinstance(value, kinds):
            raise UserError(f"{name} is {short_repr(value)}; give {cure}")


def _engine_config(stored: config.Config, options: dict) -> tuple[config.Serve, config.Cache]:
    """Override the checkpoint's Serve and Cache configs with the options of `LLM`; None means not given.

    The checkpoint's max_model_len is first limited to max_position_embeddings of its model.

    Raises:
        UserError: an option is unknown.
    """
    given = {name: value for name, value in options.items() if value is not None}
    model_len = min(stored.serve.max_model_len, stored.model.max_position_embeddings)
    serve_fields = [field.name for field in dataclasses.fields(config.Serve)]
    cache_fields = [field.name for field in dataclasses.fields(config.Cache)]
    known = [*serve_fields, *cache_fields]
    for name in options:
        if name not in known:
            raise UserError(f"LLM has no option {name!r}; {suggest(name, known)}")
    serve_options = {name: given[name] for name in serve_fields if name in given}
    cache_options = {name: given[name] for name in cache_fields if name in given}
    serve = dataclasses.replace(stored.serve, **{"max_model_len": model_len, **serve_options})
    return serve, dataclasses.replace(stored.cache, **cache_options)
