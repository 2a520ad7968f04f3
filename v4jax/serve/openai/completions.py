"""/v1/completions: text or token ids in, continuations out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

from v4jax.serve.openai import protocol
from v4jax.serve.openai.endpoint import Call
from v4jax.serve.openai.errors import bad_request
from v4jax.serve.openai.logprobs import CompletionLogprobs
from v4jax.serve.output_processor import RequestState
from v4jax.serve.outputs import RequestOutput
from v4jax.serve.prompts import Prompt
from v4jax.serve.sampling_params import SamplingParams, is_int, short_repr

_FORMS = "prompt must be text, a list of token ids, or a list of these"
_DEFAULT_MAX_TOKENS = 16  # of OpenAI's API
MAX_CONTINUATIONS = 128


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A request to /v1/completions.

    Attributes:
        prompts: texts or lists of token ids.
        sampling: options of each continuation of a prompt, the same for all prompts.
        echo: the texts begin with their prompts.
        logprobs: number of likeliest tokens to report; None reports none.
        generates: False for max_tokens 0, which only echoes.
        streaming: how the reply is streamed.
        as_ids: tokens are shown as their ids.
    """

    prompts: list[Prompt]
    sampling: list[SamplingParams]
    echo: bool
    logprobs: int | None
    generates: bool
    streaming: protocol.StreamOptions
    as_ids: bool


async def completions(call: Call) -> None:
    """Answer a request to /v1/completions."""
    service = call.service
    model = protocol.model_name(call.body, service.model)
    request = await asyncio.to_thread(parse, call.body, service.llm.default_sampling_params)
    count, salt = len(request.sampling), service.cache_salt(call)
    with service.admit(call, len(request.prompts) * count):
        prompts = [_salted(prompt, salt) for prompt in request.prompts for _ in range(count)]
        states = await service.frontend.make_requests(prompts, request.sampling * len(request.prompts))
        call.prompt_tokens = sum(len(state.prompt_token_ids) for state in states[::count])
        choices = [_Choice(call, request, index, state) for index, state in enumerate(states)]
        header = {"id": f"cmpl-{call.id}", "object": "text_completion", "created": call.created, "model": model}
        if request.streaming.stream:
            await _stream(call, request, choices, header)
        else:
            await _whole(call, choices, header)


def parse(body: dict, defaults: dict) -> CompletionRequest:
    """Return the request of a body.

    Args:
        body: object of the request.
        defaults: sampling options of the checkpoint (`LLM.default_sampling_params`).

    Raises:
        ApiError, UserError: a field is invalid.
    """
    prompts = _prompts(body.get("prompt"))
    if body.get("suffix"):
        raise bad_request("suffix is not supported; this model only continues a text", "suffix")
    n = protocol.integer(body, "n", 1, MAX_CONTINUATIONS, 1)
    if (best_of := protocol.integer(body, "best_of", 1, MAX_CONTINUATIONS)) is not None and best_of != n:
        raise bad_request(f"best_of must equal n, which is {n}; this server does not rank continuations", "best_of")
    echo = protocol.flag(body, "echo")
    max_tokens = protocol.integer(body, "max_tokens", 0 if echo else 1)
    logprobs = protocol.integer(body, "logprobs", 0, protocol.MAX_LOGPROBS)
    options = protocol.sampling_options(body)
    if max_tokens is not None:
        options["max_tokens"] = max(1, max_tokens)
    elif "max_tokens" not in defaults:
        options["max_tokens"] = _DEFAULT_MAX_TOKENS
    if logprobs is not None:
        options["logprobs"] = logprobs
        if echo:
            options["prompt_logprobs"] = logprobs
    sampling = protocol.continuations(options, defaults, n)
    as_ids = protocol.flag(body, "return_tokens_as_token_ids")
    streaming = protocol.stream_options(body)
    return CompletionRequest(prompts, sampling, echo, logprobs, max_tokens != 0, streaming, as_ids)


class _Choice:
    """One continuation: turns outputs of the engine into choices of the API."""

    def __init__(self, call: Call, request: CompletionRequest, index: int, state: RequestState):
        self._call, self._request, self._index, self._state = call, request, index, state
        self._counts_cached = index % len(request.sampling) == 0  # only the first continuation of a prompt
        self._logprobs = None
        if request.logprobs is not None:
            self._logprobs = CompletionLogprobs(call.service.llm.tokenizer, request.logprobs, request.as_ids)
        self._begun = False

    def choice(self, output: RequestOutput) -> dict:
        """Return the choice of a part of the continuation; the first part has the echo."""
        ids, positions, text = output.token_ids, output.logprobs or [], output.text
        if not self._request.generates:
            ids, positions, text = [], [], ""
        if self._request.echo and not self._begun:
            text = self._prompt_text() + text
            if self._logprobs is not None:
                ids, positions = [*output.prompt_token_ids, *ids], [*output.prompt_logprobs, *positions]
        self._begun = True
        reason = output.finish_reason
        return {
            "index": self._index,
            "text": text,
            "logprobs": None if self._logprobs is None else self._logprobs.piece(ids, positions),
            "finish_reason": reason if self._request.generates or reason is None else "length",
            "stop_reason": output.stop_reason,
        }

    def count(self, output: RequestOutput) -> None:
        """Add an output to the usage of the call."""
        if output.finished:
            self._call.finish_reasons.append(output.finish_reason)
        if self._counts_cached:
            self._call.cached_tokens += output.num_cached_tokens or 0
            self._counts_cached = False
        if self._request.generates:
            self._call.completion_tokens += len(output.token_ids)

    def _prompt_text(self) -> str:
        if self._state.prompt is not None:
            return self._state.prompt
        return self._call.service.tokenizer.decode(self._state.prompt_token_ids)

    @property
    def state(self) -> RequestState:
        """The request of the engine."""
        return self._state


async def _whole(call: Call, choices: list[_Choice], header: dict) -> None:
    """Send all continuations as one object."""
    async with contextlib.aclosing(call.generation([choice.state for choice in choices]).outputs()) as outputs:
        async for event in outputs:
            if event is not None:
                choices[event[0]].count(event[1])
    results = [choice.choice(choice.state.output()) for choice in choices]
    await call.reply.json({**header, "choices": results, "usage": call.usage()})


async def _stream(call: Call, request: CompletionRequest, choices: list[_Choice], header: dict) -> None:
    """Send the continuations as events."""
    options = request.streaming
    async with contextlib.aclosing(call.generation([choice.state for choice in choices]).outputs()) as outputs:
        async for event in outputs:
            if event is None:
                await call.reply.heartbeat()
                continue
            index, output = event
            choices[index].count(output)
            chunk = {**header, "choices": [choices[index].choice(output)]}
            if options.include_usage:
                chunk["usage"] = call.usage() if options.continuous_usage else None
            await call.reply.event(chunk)
    if options.include_usage:
        await call.reply.event({**header, "choices": [], "usage": call.usage()})
    await call.reply.event("[DONE]")
    await call.reply.end()


def _prompts(value: object) -> list[Prompt]:
    """Return the prompts of the field `prompt`: one text, several, one list of ids, or several."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise bad_request(f"{_FORMS}, got {short_repr(value)}", "prompt")
    if all(map(is_int, value)):
        return [value]
    if all(isinstance(one, str) for one in value):
        return value
    if all(isinstance(one, list) and all(map(is_int, one)) for one in value):
        return value
    raise bad_request(f"{_FORMS}, got {short_repr(value)}", "prompt")


def _salted(prompt: Prompt, salt: str | None) -> Prompt:
    """Return the prompt with the cache salt of its client."""
    named = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    return named if salt is None else {**named, "cache_salt": salt}
