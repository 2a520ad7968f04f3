"""From sampled tokens to text: detokenizing, stop strings, log-probabilities, finish reasons, `RequestOutput`.

`OutputProcessor` makes a `RequestState` for every request. `engine_loop.EngineLoop` passes the sampled tokens of each
step to the states, in its own thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from v4jax.cache.block_hash import ExtraKey
from v4jax.data.tokenizer import Detokenizer, Tokenizer
from v4jax.serve.engine import SampledTokens
from v4jax.serve.outputs import CompletionOutput, Logprob, RequestOutput
from v4jax.serve.sampler import SamplerOutput
from v4jax.serve.sampling_params import SamplingParams
from v4jax.serve.stop_tokens import Ends
from v4jax.serve.token_masks import TokenMask


class OutputProcessor:
    """Makes the request states of one engine, and counts their tokens.

    Args:
        tokenizer: turns token ids into text; without one, texts are "".
        ends: ids that end every text of the model.

    Attributes:
        num_prompt_tokens: prompt tokens of the requests that have got a token.
        num_generation_tokens: generated tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, ends: Ends):
        self._tokenizer, self._ends = tokenizer, ends
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0

    def new_request(
        self,
        prompt: str | None,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        cache_salt: str | None = None,
        extra_keys: Sequence[ExtraKey] = (),
        masks: Sequence[Sequence[TokenMask]] | None = None,
    ) -> RequestState:
        """Make the state of a request that `Engine.check` accepts.

        Args:
            masks: token masks of each continuation; None means none. The others are attributes of `RequestState`.
        """
        ends = Ends(frozenset(sampling.stop_token_ids), None)
        if not sampling.ignore_eos:
            ends = Ends(ends.ids | self._ends.ids, self._ends.eos_id)
        completions = [
            CompletionState(self, index, sampling, ends, self._tokenizer, masks[index] if masks else ())
            for index in range(sampling.n)
        ]
        held_back = ends.ids | self._ends.ids
        return RequestState(
            self, prompt, prompt_token_ids, sampling, completions, held_back, cache_salt, tuple(extra_keys)
        )

    def stats(self) -> dict[str, float]:
        """Return `prompt_tokens` and `generation_tokens`, the tokens since the start, under vLLM's names."""
        return {"prompt_tokens": self.num_prompt_tokens, "generation_tokens": self.num_generation_tokens}


class RequestState:
    """One prompt and its continuations. The thread of the engine changes it; others read it once it has finished.

    Attributes:
        prompt: text of the prompt; None if only token ids were given.
        prompt_token_ids: token ids of the prompt.
        sampling: sampling options.
        completions: the `sampling.n` continuations.
        stop_ids: ids that `sampling.min_tokens` holds back.
        cache_salt: blocks are shared only between requests of the same salt; None is a salt of its own.
        extra_keys: what the prompt's token ids do not tell (`block_hash.ExtraKey`).
        num_cached_tokens: prompt tokens found in the prefix cache; None before the first token.
        prompt_logprobs: see `RequestOutput`; None before the first token.
        error: see `RequestOutput`.
    """

    def __init__(
        self,
        processor: OutputProcessor,
        prompt: str | None,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        completions: list[CompletionState],
        stop_ids: frozenset[int],
        cache_salt: str | None,
        extra_keys: tuple[ExtraKey, ...],
    ):
        self.prompt, self.prompt_token_ids, self.sampling = prompt, prompt_token_ids, sampling
        self.completions, self.stop_ids = completions, stop_ids
        self.cache_salt, self.extra_keys = cache_salt, extra_keys
        self.num_cached_tokens: int | None = None
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.error: str | None = None
        self._processor = processor
        self._prompt_sent = False  # whether `delta` has returned the prompt's log-probabilities

    @property
    def finished(self) -> bool:
        """Whether all continuations have ended."""
        return all(one.finish_reason is not None for one in self.completions)

    def sampling_of(self, index: int) -> SamplingParams:
        """Return the sampling options of one continuation, with a seed of its own."""
        if self.sampling.n == 1:
            return self.sampling
        seed = self.sampling.seed
        return dataclasses.replace(self.sampling, n=1, seed=None if seed is None else (seed + index) % 2**64)

    def update(self, drawn: SampledTokens, index: int = 0) -> None:
        """Append the tokens of one step to a continuation, up to the token that finishes it; later ones are ignored."""
        if self.num_cached_tokens is None:
            self.num_cached_tokens = drawn.num_cached_tokens
        if drawn.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = self._logprobs_of_prompt(drawn.prompt_logprobs)
        completion = self.completions[index]
        if drawn.error is not None and completion.finish_reason is None:
            self.error = drawn.error
            completion.finish("error")
        for i in range(drawn.count):
            if completion.finish_reason is None:
                sampled = jax.tree.map(lambda a, i=i: a[drawn.row, i], drawn.sampled)
                if sampled.finite_B:
                    if not any(one.token_ids for one in self.completions):
                        self._processor.num_prompt_tokens += len(self.prompt_token_ids)
                    completion.append(sampled)
                else:
                    position = len(self.prompt_token_ids) + len(completion.token_ids)
                    self.error = (
                        f"the logits of token {position} are not finite; "
                        "the weights may be damaged, or dtype too narrow"
                    )
                    completion.finish("error")

    def abort(self) -> None:
        """Finish the continuations that go on with the reason "abort"."""
        for completion in self.completions:
            if completion.finish_reason is None:
                completion.finish("abort")

    def output(self) -> RequestOutput:
        """Return all that was generated."""
        outputs = [completion.output() for completion in self.completions]
        return self._output(outputs, 0, self.prompt_logprobs)

    def delta(self) -> RequestOutput | None:
        """Return what was generated since the last call; None if that is nothing and the request has not finished."""
        new = [completion for completion in self.completions if completion.has_news]
        if not new and not self.finished:
            return None
        unfinished = sum(one.finish_reason is None and not one.has_news for one in self.completions)
        prompt_logprobs = None if self._prompt_sent else self.prompt_logprobs
        self._prompt_sent = self.prompt_logprobs is not None
        outputs = [completion.delta() for completion in new or self.completions]
        return self._output(outputs, unfinished, prompt_logprobs)

    def _output(self, outputs: list[CompletionOutput], unfinished: int, prompt_logprobs) -> RequestOutput:
        return RequestOutput(
            self.prompt,
            self.prompt_token_ids,
            outputs,
            self.error,
            self.num_cached_tokens,
            prompt_logprobs,
            unfinished,
        )

    def _logprobs_of_prompt(self, arrays: tuple[np.ndarray, ...]) -> list[dict[int, Logprob] | None]:
        logprob_T, rank_T, top_TK, top_ids_TK = arrays
        tokens = self.prompt_token_ids[1:]
        rows = zip(tokens, logprob_T, rank_T, top_TK, top_ids_TK, strict=False)  # they may go on after the prompt
        count = self.sampling.prompt_logprobs
        return [None, *(_logprobs(int(token), *row, count) for token, *row in rows)]


class CompletionState:
    """Text and tokens of one continuation.

    Attributes:
        text: generated text that is safe to show.
        token_ids: generated token ids.
        logprobs: log-probabilities of each generated token, if the sampling options ask for them.
        finish_reason: see `CompletionOutput`; None until the continuation has finished.
        stop_reason: see `CompletionOutput`.
        masks: masks of the tokens that it may have.
        detokenizer: turns its token ids into text; None without a tokenizer.
    """

    def __init__(
        self,
        processor: OutputProcessor,
        index: int,
        sampling: SamplingParams,
        ends: Ends,
        tokenizer: Tokenizer | None,
        masks: Sequence[TokenMask],
    ):
        self.masks = masks
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._processor, self._index, self._sampling, self._ends = processor, index, sampling, ends
        self.detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self._held = ""  # text after `text`, which may be the beginning of a stop string
        self._early = 0  # characters of `_held` that belong to the first `min_tokens` tokens
        self._text_sent = self._tokens_sent = 0  # characters and tokens that `delta` has returned
        self._end_sent = False

    @property
    def has_news(self) -> bool:
        """Whether it has tokens or an end that `delta` has not returned."""
        return len(self.token_ids) > self._tokens_sent or (self.finish_reason is not None and not self._end_sent)

    def output(self) -> CompletionOutput:
        """Return all that was generated."""
        return self._output(0, 0)

    def delta(self) -> CompletionOutput:
        """Return what was generated since the last call."""
        sent = self._output(self._text_sent, self._tokens_sent)
        self._text_sent, self._tokens_sent = len(self.text), len(self.token_ids)
        self._end_sent = self.finish_reason is not None
        return sent

    def _output(self, first_character: int, first_token: int) -> CompletionOutput:
        logprobs = None if self._sampling.logprobs is None else self.logprobs[first_token:]
        text, token_ids = self.text[first_character:], self.token_ids[first_token:]
        return CompletionOutput(self._index, text, token_ids, logprobs, self.finish_reason, self.stop_reason)

    def append(self, sampled: SamplerOutput) -> None:
        """Append one token; it may finish the continuation."""
        token = int(sampled.token_B)
        self._processor.num_generation_tokens += 1
        self.token_ids.append(token)
        if (count := self._sampling.logprobs) is not None:
            fields = (sampled.logprob_B, sampled.rank_B, sampled.top_BK, sampled.top_ids_BK)
            self.logprobs.append(_logprobs(token, *fields, count))
        if token in self._ends.ids:
            self.stop_reason = None if token == self._ends.eos_id else token
            return self.finish("stop")
        if self.detokenizer:
            self._show(self.detokenizer.push(token))
        if self.finish_reason is None and len(self.token_ids) == self._sampling.max_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """End the continuation; text held back as a possible stop string becomes part of its text."""
        if self.detokenizer:
            self._show(self.detokenizer.flush())
        if self.finish_reason is None:
            self.finish_reason = reason
            self.text, self._held = self.text + self._held, ""

    def _show(self, text: str) -> None:
        """Append decoded text, hold back a possible beginning of a stop string, and finish at a complete one."""
        text = self._held + text
        early = len(text) if len(self.token_ids) <= self._sampling.min_tokens else self._early
        shown, stopped, self._held = split_at_stop(text, self._sampling.stop, early)
        self._early = max(0, early - len(shown))
        if stopped:
            self.finish_reason = "stop"
            here = [stop for stop in self._sampling.stop if text.startswith(stop, len(shown))]
            self.stop_reason = min(here, key=len)  # of several that begin here, the shortest is complete first
        self.text += shown


def split_at_stop(text: str, stops: Sequence[str], early: int = 0) -> tuple[str, bool, str]:
    """Split text into a part that is safe to show and a part that may belong to a stop string.

    The stop string whose end comes first in the text counts, and of several with that end the longest. The result
    therefore does not depend on how the text is cut into tokens.

    Args:
        text: text that was not shown yet.
        stops: the stop strings.
        early: a stop string that ends within the first `early` characters does not count.

    Returns:
        (safe text, whether a stop string ended it, held text). The held text is the longest end of `text` that is the
        beginning of a stop string; it is "" if a stop string ended the text.
    """
    places = [(text.find(stop, max(0, early + 1 - len(stop))), len(stop)) for stop in stops]
    found = [(start + length, start) for start, length in places if start >= 0]
    if found:
        return text[: min(found)[1]], True, ""
    longest = max(map(len, stops), default=1)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], False, text[start:]
    return text, False, ""


def _logprobs(token: int, logprob, rank, top_K, top_ids_K, count: int) -> dict[int, Logprob]:
    """Return the Logprob of a token, then of the `count` likeliest tokens, of one position."""
    found = {token: Logprob(float(logprob), int(rank))}
    for rank, (i, logprob) in enumerate(zip(top_ids_K[:count], top_K[:count], strict=True), 1):
        found.setdefault(int(i), Logprob(float(logprob), rank))
    return found
