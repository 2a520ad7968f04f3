"""What `LLM.generate` returns, in the form of vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from v4jax.serve.sampling import Logprob


@dataclass
class CompletionOutput:
    """One continuation of a prompt.

    index: 0, the number of the continuation. text: without the stop string, "" if there is no tokenizer. token_ids:
    with the token that ended it. logprobs: per token {id: Logprob}, the chosen one first, or None if not asked for.
    finish_reason: "stop" (end of document, stop string or stop token), "length" (max_tokens) or "error". stop_reason:
    the stop string or the stop token id that ended it; None for the eos token and for every other finish_reason.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """What one prompt became.

    prompt: its text, None if it came as token ids alone. outputs: its one continuation, whose fields are also those of
    this object, so `out.text` is `out.outputs[0].text`. error: what went wrong where finish_reason is "error".
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    error: str | None = None

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
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.outputs[0].stop_reason
