"""`LLM`: a model, its tokenizer and an engine behind vLLM's names."""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from v4jax import checkpoint, config
from v4jax.core.check import UserError
from v4jax.data.tokenizer import Detokenizer, Tokenizer, load_tokenizer
from v4jax.models.transformer import Transformer
from v4jax.serve.engine import Engine, Request
from v4jax.serve.sampling import Logprob, Sampled, SamplingParams

Prompt = str | Sequence[int]


@dataclass
class RequestOutput:
    """What one prompt became.

    text: without the stop string, "" if there is no tokenizer. token_ids: with the token that ended it. logprobs: per
    token {id: Logprob}, the chosen one first, or None if not asked for. finish_reason: "stop" (end of document, stop
    string or stop token), "length" (max_tokens) or "error", which `error` then describes.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str
    error: str | None = None


class LLM:
    """Generates text with one model.

    model: a directory (a run, an orbax checkpoint or Hugging Face weights) or a Transformer. tokenizer: a Tokenizer or
    its path; by default the directory's own; without one, prompts must be token ids. dtype: "float32" or "bfloat16",
    for a directory only. max_batch, max_seq_len (prompt and new tokens), prefill_chunk: limits of the engine, by
    default those of the checkpoint's config. Raises UserError.
    """

    def __init__(
        self,
        model: str | os.PathLike | Transformer,
        *,
        tokenizer: Tokenizer | str | os.PathLike | None = None,
        dtype: str | None = None,
        max_batch: int | None = None,
        max_seq_len: int | None = None,
        prefill_chunk: int | None = None,
    ):
        if isinstance(model, Transformer):
            shape, limits = model.config, config.Serve()
            if dtype is not None:
                raise UserError("dtype applies when a checkpoint is read; give a directory, or a model of that dtype")
        else:
            stored = checkpoint.load_config(model)
            shape, limits = stored.model, stored.serve
            tokenizer = load_tokenizer(model, shape) if tokenizer is None else tokenizer
        if isinstance(tokenizer, (str, os.PathLike)):
            tokenizer = Tokenizer(tokenizer)
        limits = dataclasses.replace(limits, max_seq_len=min(limits.max_seq_len, shape.max_positions))
        given = {"max_batch": max_batch, "max_seq_len": max_seq_len, "prefill_chunk": prefill_chunk}
        limits = dataclasses.replace(limits, **{name: value for name, value in given.items() if value is not None})
        _check_limits(limits, shape)
        if not isinstance(model, Transformer):  # last: reading weights may take minutes
            model = checkpoint.load(model, dtype=dtype)
        self.tokenizer, self.engine = tokenizer, Engine(model, limits)
        self._ends = tokenizer or model.config  # who knows the ids of bos and eos

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt, a string or a list of token ids, under one SamplingParams or one each.

        Strings are read as the beginning of a document: bos is put before them. More prompts than `max_batch` run in
        several batches. A request whose logits are not finite ends alone, with finish_reason "error". Raises UserError,
        before anything runs, for a request that cannot be run.
        """
        rows = self._rows(prompts, sampling_params)
        for _ in self._run(rows):
            pass
        return [row.output() for row in rows]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, str]]:
        """`generate`, as (index of the prompt, piece of its text) while the pieces come.

        A piece never ends inside a character or in what may become a stop string; the pieces of a prompt join to its
        text. After the last piece, UserError if a request ended in an error. Closing the iterator frees its memory.
        """
        self._need_tokenizer("streaming text")
        return self._stream(self._rows(prompts, sampling_params))

    def _stream(self, rows: list[_Row]) -> Iterator[tuple[int, str]]:
        yield from self._run(rows)
        for index, row in enumerate(rows):
            if row.error:
                raise UserError(f"prompt {index} was stopped: {row.error}")

    def _run(self, rows: list[_Row]) -> Iterator[tuple[int, str]]:
        """Fill the rows, batch after batch, and yield their text."""
        size = self.engine.limits.max_batch
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            with contextlib.closing(self.engine.run([row.request for row in batch])) as steps:
                for sampled in steps:
                    for i, row in enumerate(batch):
                        if row.finish_reason is None and (piece := row.take(sampled, i)):
                            yield first + i, piece
                    if all(row.finish_reason for row in batch):
                        break

    def _rows(self, prompts, sampling_params) -> list[_Row]:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise UserError(f"{len(sampling_params)} sampling_params for {len(prompts)} prompts; give one, or one each")
        return [self._row(f"prompt {i}", *pair) for i, pair in enumerate(zip(prompts, sampling_params, strict=True))]

    def _row(self, name: str, prompt: Prompt, sampling: SamplingParams) -> _Row:
        if sampling.stop:
            self._need_tokenizer(f"{name} uses stop strings, which")
        request = Request(self._ids(name, prompt), sampling)
        self.engine.check(request, name)
        ends = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else [self._ends.eos_id])}
        text = prompt if isinstance(prompt, str) else None
        return _Row(text, request, frozenset(ends), Detokenizer(self.tokenizer) if self.tokenizer else None)

    def _ids(self, name: str, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; [] for one that has none."""
        if isinstance(prompt, str):
            self._need_tokenizer(f"{name} is text, which")
            return [self._ends.bos_id, *self.tokenizer.encode(prompt)] if prompt else []
        is_list = isinstance(prompt, (Sequence, np.ndarray)) and not isinstance(prompt, bytes)
        if not is_list or not all(isinstance(i, numbers.Integral) for i in prompt):
            raise UserError(f"{name} is neither a string nor a list of token ids: {prompt!r:.60}")
        return [int(i) for i in prompt]

    def _need_tokenizer(self, what: str) -> None:
        if self.tokenizer is None:
            raise UserError(f"{what} needs a tokenizer; put tokenizer.json into the checkpoint or pass tokenizer=")


class _Row:
    """One request while it is generated. `ends` are the token ids that end it."""

    def __init__(self, prompt: str | None, request: Request, ends: frozenset[int], detokenizer: Detokenizer | None):
        self.prompt, self.request, self.ends, self.detokenizer = prompt, request, ends, detokenizer
        self.text, self.held = "", ""  # shown; not yet, as it may begin a stop string
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.finish_reason: str | None = None
        self.error: str | None = None

    def take(self, sampled: Sampled, row: int) -> str:
        """Take one token of the batch; the text that it completes."""
        sampling = self.request.sampling
        if not sampled.finite_B[row]:
            position = len(self.request.prompt) + len(self.token_ids)
            self.error = (
                f"the logits of token {position} are not finite; the weights may be damaged, or dtype too narrow"
            )
            return self._finish("error")
        token = int(sampled.token_B[row])
        self.token_ids.append(token)
        if sampling.logprobs is not None:
            self.logprobs.append(_logprobs(sampled, row, sampling.logprobs))
        if token in self.ends:
            return self._finish("stop")
        piece = self._show(self.detokenizer.push(token)) if self.detokenizer else ""
        if self.finish_reason is None and len(self.token_ids) == sampling.max_tokens:
            piece += self._finish("length")
        return piece

    def output(self) -> RequestOutput:
        logprobs = None if self.request.sampling.logprobs is None else self.logprobs
        return RequestOutput(
            self.prompt, self.request.prompt, self.text, self.token_ids, logprobs, self.finish_reason, self.error
        )

    def _finish(self, reason: str) -> str:
        """End here: what was held back is text after all."""
        piece = self._show(self.detokenizer.flush()) if self.detokenizer else ""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.text, piece, self.held = self.text + self.held, piece + self.held, ""
        return piece

    def _show(self, new: str) -> str:
        """Add text; give out what no stop string can touch any more, and finish at the first stop string."""
        shown, stopped, self.held = split_at_stop(self.held + new, self.request.sampling.stop)
        if stopped:
            self.finish_reason = "stop"
        self.text += shown
        return shown


def split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool, str]:
    """(text that is safe to show, whether a stop string ended it, the rest, which may begin a stop string).

    The stop string that is complete first counts, the longest of several, so the cuts between tokens do not matter.
    """
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    if found:
        return text[: min(found)[1]], True, ""
    longest = max(map(len, stops), default=1)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], False, text[start:]
    return text, False, ""


def _logprobs(sampled: Sampled, row: int, count: int) -> dict[int, Logprob]:
    """The chosen token, then the `count` likeliest ones."""
    found = {int(sampled.token_B[row]): Logprob(float(sampled.logprob_B[row]), int(sampled.rank_B[row]))}
    likeliest = zip(sampled.top_ids_BK[row, :count], sampled.top_BK[row, :count], strict=True)
    for rank, (i, logprob) in enumerate(likeliest, 1):
        found.setdefault(int(i), Logprob(float(logprob), rank))
    return found


def _check_limits(limits: config.Serve, model: config.Model) -> None:
    """Raise UserError for a limit that cannot be kept."""
    for name in ("max_batch", "max_seq_len", "prefill_chunk"):
        if getattr(limits, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(limits, name)}")
    if limits.max_seq_len > model.max_positions:
        raise UserError(f"max_seq_len {limits.max_seq_len} exceeds the {model.max_positions} positions of the model")
