"""Results of a request, in the form of vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Logprob(NamedTuple):
    """Log-probability (natural) of a token under the model, before temperature and filters, and its rank from 1."""

    logprob: float
    rank: int


@dataclass
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
        index: number of the continuation, from 0 to `SamplingParams.n` - 1.
        text: generated text without the stop string; "" without a tokenizer.
        token_ids: generated token ids, including the token that ended the text.
        logprobs: for each token {id: Logprob}, the sampled token first; None if not requested.
        finish_reason: "stop" (end of document, stop string or stop token), "length" (max_tokens), "abort" (the caller
            aborted the request) or "error"; None in a part of a stream that is not the last.
        stop_reason: the stop string or the stop token id that ended the text; None for the eos token and for every
            other finish_reason.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """Result of one prompt, whole or a part of a stream.

    The fields of its first continuation are also properties: `out.text` is `out.outputs[0].text`.

    Attributes:
        prompt: text of the prompt; None if only token ids were given.
        prompt_token_ids: token ids of the prompt.
        outputs: the `SamplingParams.n` continuations; in a part of a stream those of which something is new.
        error: description of the error if finish_reason is "error", else None.
        num_cached_tokens: tokens of the prompt that were found in the prefix cache; None if the request ended before
            its first token.
        prompt_logprobs: for each prompt token {id: Logprob}, the token itself first; the first entry is None. None if
            not requested, and in a part of a stream that does not contain the first token.
        num_unfinished: continuations that have not ended, beside those in `outputs`.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    error: str | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_unfinished: int = 0

    @property
    def finished(self) -> bool:
        """Whether all continuations have ended."""
        return not self.num_unfinished and all(one.finish_reason is not None for one in self.outputs)

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        return self.outputs[0].logprobs

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.outputs[0].stop_reason
