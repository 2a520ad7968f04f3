"""/v1/chat/completions: messages in, replies with reasoning, text and tool calls out."""

from __future__ import annotations

import dataclasses

from v4jax.data.chat.decoding import Delta, DeltaKind
from v4jax.serve.openai import protocol
from v4jax.serve.openai.endpoint import Call
from v4jax.serve.openai.errors import bad_request
from v4jax.serve.openai.logprobs import chat_logprobs
from v4jax.serve.openai.replies import Part, Replies, ReplyState, chat_options

_MAX_CHOICES = 128


@dataclasses.dataclass(frozen=True)
class _Format:
    """What the chunks of a reply have.

    Attributes:
        header: fields of every object.
        streaming: how the reply is streamed.
        top_logprobs: number of likeliest tokens of a position; None reports no log-probabilities.
    """

    header: dict
    streaming: protocol.StreamOptions
    top_logprobs: int | None


async def chat_completions(call: Call) -> None:
    """Answer a request to /v1/chat/completions."""
    service, body = call.service, call.body
    model = protocol.model_name(body, service.model)
    streaming = protocol.stream_options(body)
    n = protocol.integer(body, "n", 1, _MAX_CHOICES, 1)
    options = protocol.sampling_options(body)
    top_logprobs = _top_logprobs(body)
    if top_logprobs is not None:
        options["logprobs"] = top_logprobs
    name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    max_tokens = protocol.integer(body, name, 1)
    settings = chat_options(body)
    conversation = service.encoder.from_chat_completions(settings.body)
    with service.admit(call, n):
        replies = await Replies.start(call, conversation, options, max_tokens, n, settings)
        header = {"id": f"chatcmpl-{call.id}", "created": call.created, "model": model}
        format = _Format(header, streaming, top_logprobs)
        if streaming.stream:
            await _stream(call, replies, format)
        else:
            await _whole(call, replies, format)


def _top_logprobs(body: dict) -> int | None:
    """Return the number of likeliest tokens to report for each position; None reports none."""
    count = protocol.integer(body, "top_logprobs", 0, protocol.MAX_LOGPROBS)
    if not protocol.flag(body, "logprobs"):
        if count:
            raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
        return None
    return count or 0


async def _whole(call: Call, replies: Replies, format: _Format) -> None:
    """Send all replies as one object."""
    async for _ in replies.parts():
        pass
    choices = [
        {
            "index": state.index,
            "message": _message(state),
            "logprobs": _logprobs(call, state.ids, state.positions, format),
            "finish_reason": state.finish_reason,
            "stop_reason": state.stop_reason,
        }
        for state in replies.states
    ]
    await call.reply.json({**format.header, "object": "chat.completion", "choices": choices, "usage": call.usage()})


def _message(state: ReplyState) -> dict:
    """Return the message of a complete reply."""
    reply = state.reply()
    message: dict = {"role": "assistant", "content": reply.content or (None if reply.tool_calls else "")}
    message["reasoning_content"] = reply.reasoning_content
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.arguments}}
            for one in reply.tool_calls
        ]
    return message


async def _stream(call: Call, replies: Replies, format: _Format) -> None:
    """Send the replies as chunks."""
    header = {**format.header, "object": "chat.completion.chunk"}
    begun = False
    async for part in replies.parts():
        if not begun:
            begun = True
            for state in replies.states:
                role = {"role": "assistant", "content": ""}
                await _send(call, header, format, {"index": state.index, "delta": role, "finish_reason": None})
        if part is None:
            await call.reply.heartbeat()
            continue
        for choice in _choices(call, part, format):
            await _send(call, header, format, choice)
    if format.streaming.include_usage:
        await call.reply.event({**header, "choices": [], "usage": call.usage()})
    await call.reply.event("[DONE]")
    await call.reply.end()


def _choices(call: Call, part: Part, format: _Format) -> list[dict]:
    """Return the choices of the chunks of a part: one for each delta, and one for the end."""
    choices = [{"index": part.state.index, "delta": _delta(delta), "finish_reason": None} for delta in part.deltas]
    if part.state.finish_reason is not None:
        end = {"finish_reason": part.state.finish_reason, "stop_reason": part.state.stop_reason}
        choices.append({"index": part.state.index, "delta": {}, **end})
    if format.top_logprobs is not None and part.ids:
        if not choices:
            choices.append({"index": part.state.index, "delta": {}, "finish_reason": None})
        choices[0]["logprobs"] = _logprobs(call, part.ids, part.positions, format)
    return choices


def _delta(delta: Delta) -> dict:
    """Return the delta of a chunk."""
    if delta.kind is DeltaKind.REASONING:
        return {"reasoning_content": delta.text}
    if delta.kind is DeltaKind.CONTENT:
        return {"content": delta.text}
    if delta.kind is DeltaKind.ARGUMENTS:
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
    function = {"name": delta.name, "arguments": ""}
    return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}


async def _send(call: Call, header: dict, format: _Format, choice: dict) -> None:
    choice.setdefault("logprobs", None)
    chunk = {**header, "choices": [choice]}
    if format.streaming.include_usage:
        chunk["usage"] = call.usage() if format.streaming.continuous_usage else None
    await call.reply.event(chunk)


def _logprobs(call: Call, ids: list[int], positions: list[dict], format: _Format) -> dict | None:
    if format.top_logprobs is None:
        return None
    return {"content": chat_logprobs(call.service.llm.tokenizer, ids, positions, format.top_logprobs)}
