"""From sampled tokens to text: detokenizing, stop strings, log-probabilities, finish reasons, `RequestOutput`.

`OutputProcessor` makes a `RequestState` for every request. `engine_loop.EngineLoop` passes the sampled tokens of each
step to the states, in its own thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from v4jax.cache.block_hash import ExtraKey
from v4jax.data.tokenizer import Detokenizer, Tokenizer
from v4jax.serve.engine import SampledTokens
from v4jax.serve.outputs import CompletionOutput, Logprob, RequestOutput
from v4jax.serve.sampler import SamplerOutput
from v4jax.serve.sampling_params import SamplingParams
from v4jax.serve.stop_tokens import Ends


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
    ) -> RequestState:
        """Make the state of a request that `Engine.check` accepts; the arguments are attributes of `RequestState`."""
        ends = Ends(frozenset(sampling.stop_token_ids), None)
        if not sampling.ignore_eos:
            ends = Ends(ends.ids | self._ends.ids, self._ends.eos_id)
        detokenizer = Detokenizer(self._tokenizer) if self._tokenizer else None
        return RequestState(self, prompt, prompt_token_ids, sampling, ends, detokenizer, cache_salt, tuple(extra_keys))

    def stats(self) -> dict[str, float]:
        """Return `prompt_tokens` and `generation_tokens`, the tokens since the start, under vLLM's names."""
        return {"prompt_tokens": self.num_prompt_tokens, "generation_tokens": self.num_generation_tokens}


class RequestState:
    """Text and tokens of one request. The thread of the engine changes it; others read it once it has finished.

    Attributes:
        prompt: text of the prompt; None if only token ids were given.
        prompt_token_ids: token ids of the prompt.
        sampling: sampling options.
        cache_salt: blocks are shared only between requests of the same salt; None is a salt of its own.
        extra_keys: what the prompt's token ids do not tell (`block_hash.ExtraKey`).
        text: generated text that is safe to show.
        token_ids: generated token ids.
        logprobs: log-probabilities of each generated token, if the sampling options ask for them.
        num_cached_tokens: prompt tokens found in the prefix cache; None before the first token.
        finish_reason: see `CompletionOutput`; None until the request has finished.
        stop_reason, error: see `CompletionOutput` and `RequestOutput`.
    """

    def __init__(
        self,
        processor: OutputProcessor,
        prompt: str | None,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        ends: Ends,
        detokenizer: Detokenizer | None,
        cache_salt: str | None,
        extra_keys: tuple[ExtraKey, ...],
    ):
        self.prompt, self.prompt_token_ids, self.sampling = prompt, prompt_token_ids, sampling
        self.cache_salt, self.extra_keys = cache_salt, extra_keys
        self.detokenizer = detokenizer
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.num_cached_tokens: int | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self._processor, self._ends = processor, ends
        self._held = ""  # text after `text`, which may be the beginning of a stop string
        self._text_sent = self._tokens_sent = 0  # characters and tokens that `delta` has returned

    def update(self, drawn: SampledTokens) -> None:
        """Append the tokens of one step, up to the token that finishes the request; later ones are ignored."""
        self.num_cached_tokens = drawn.num_cached_tokens
        for i in range(drawn.count):
            if self.finish_reason is None:
                self._append(jax.tree.map(lambda a, i=i: a[drawn.row, i], drawn.sampled))

    def abort(self) -> None:
        """Finish with the reason "abort", unless the request has finished."""
        if self.finish_reason is None:
            self._finish("abort")

    def output(self) -> RequestOutput:
        """Return all that was generated."""
        return self._output(0, 0)

    def delta(self) -> RequestOutput | None:
        """Return what was generated since the last call; None if that is nothing and the request has not finished."""
        if len(self.token_ids) == self._tokens_sent and self.finish_reason is None:
            return None
        sent = self._output(self._text_sent, self._tokens_sent)
        self._text_sent, self._tokens_sent = len(self.text), len(self.token_ids)
        return sent

    def _output(self, first_character: int, first_token: int) -> RequestOutput:
        logprobs = None if self.sampling.logprobs is None else self.logprobs[first_token:]
        text, token_ids = self.text[first_character:], self.token_ids[first_token:]
        completion = CompletionOutput(0, text, token_ids, logprobs, self.finish_reason, self.stop_reason)
        return RequestOutput(self.prompt, self.prompt_token_ids, [completion], self.error, self.num_cached_tokens)

    def _append(self, sampled: SamplerOutput) -> None:
        if not sampled.finite_B:
            position = len(self.prompt_token_ids) + len(self.token_ids)
            self.error = (
                f"the logits of token {position} are not finite; the weights may be damaged, or dtype too narrow"
            )
            return self._finish("error")
        token = int(sampled.token_B)
        if not self.token_ids:
            self._processor.num_prompt_tokens += len(self.prompt_token_ids)
        self._processor.num_generation_tokens += 1
        self.token_ids.append(token)
        if self.sampling.logprobs is not None:
            self.logprobs.append(_logprobs(sampled, self.sampling.logprobs))
        if token in self._ends.ids:
            self.stop_reason = None if token == self._ends.eos_id else token
            return self._finish("stop")
        if self.detokenizer:
            self._show(self.detokenizer.push(token))
        if self.finish_reason is None and len(self.token_ids) == self.sampling.max_tokens:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        """End the request; text held back as a possible stop string becomes part of its text."""
        if self.detokenizer:
            self._show(self.detokenizer.flush())
        if self.finish_reason is None:
            self.finish_reason = reason
            self.text, self._held = self.text + self._held, ""

    def _show(self, text: str) -> None:
        """Append decoded text, hold back a possible beginning of a stop string, and finish at a complete one."""
        text = self._held + text
        shown, stopped, self._held = split_at_stop(text, self.sampling.stop)
        if stopped:
            self.finish_reason = "stop"
            here = [stop for stop in self.sampling.stop if text.startswith(stop, len(shown))]
            self.stop_reason = min(here, key=len)  # of several that begin here, the shortest is complete first
        self.text += shown


def split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool, str]:
    """Split text into a part that is safe to show and a part that may belong to a stop string.

    The stop string whose end comes first in the text counts, and of several with that end the longest. The result
    therefore does not depend on how the text is cut into tokens.

    Returns:
        (safe text, whether a stop string ended it, held text). The held text is the longest end of `text` that is the
        beginning of a stop string; it is "" if a stop string ended the text.
    """
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    if found:
        return text[: min(found)[1]], True, ""
    longest = max(map(len, stops), default=1)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], False, text[start:]
    return text, False, ""


def _logprobs(sampled: SamplerOutput, count: int) -> dict[int, Logprob]:
    """Return the Logprob of the sampled token, then of the `count` likeliest tokens, of one position."""
    found = {int(sampled.token_B): Logprob(float(sampled.logprob_B), int(sampled.rank_B))}
    for rank, (i, logprob) in enumerate(zip(sampled.top_ids_BK[:count], sampled.top_BK[:count], strict=True), 1):
        found.setdefault(int(i), Logprob(float(logprob), rank))
    return found
