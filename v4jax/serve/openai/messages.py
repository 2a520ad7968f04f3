"""/v1/messages and /v1/messages/count_tokens: the Messages API of Anthropic."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from v4jax.data.chat.decoding import Delta, DeltaKind
from v4jax.data.chat.json_text import parse_arguments
from v4jax.serve.openai import protocol
from v4jax.serve.openai.endpoint import Call
from v4jax.serve.openai.errors import bad_request
from v4jax.serve.openai.replies import ChatOptions, Replies, ReplyState, encode_prompt

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
_DELTAS = {
    DeltaKind.REASONING: ("thinking", "thinking_delta", "thinking"),
    DeltaKind.CONTENT: ("text", "text_delta", "text"),
    DeltaKind.ARGUMENTS: ("tool_use", "input_json_delta", "partial_json"),
}


async def messages(call: Call) -> None:
    """Answer a request to /v1/messages."""
    service, body = call.service, call.body
    model = protocol.model_name(body, service.model)
    max_tokens = protocol.integer(body, "max_tokens", 1)
    if max_tokens is None:
        raise bad_request("max_tokens is missing; send the most tokens of the reply", "max_tokens")
    stream = protocol.flag(body, "stream")
    options = protocol.sampling_options({**body, "stop": body.get("stop_sequences")})
    conversation = service.encoder.from_messages(body)
    with service.admit(call, 1):
        replies = await Replies.start(call, conversation, options, max_tokens)
        message = {"id": f"msg_{call.id}", "type": "message", "role": "assistant", "model": model}
        if stream:
            await _stream(call, replies, message)
        else:
            async for _ in replies.parts():
                pass
            [state] = replies.states
            end = {"content": _content(state), **_end(state), "usage": _usage(call)}
            await call.reply.json({**message, **end})


async def count_tokens(call: Call) -> None:
    """Answer a request to /v1/messages/count_tokens."""
    service = call.service
    protocol.model_name(call.body, service.model)
    conversation = service.encoder.from_messages(call.body)
    ids = await asyncio.to_thread(encode_prompt, service.encoder, conversation, ChatOptions(call.body))
    await call.reply.json({"input_tokens": len(ids)})


async def _stream(call: Call, replies: Replies, message: dict) -> None:
    """Send the reply as events."""
    [state] = replies.states
    blocks = _Blocks()
    begun = False
    async for part in replies.parts():
        if part is None:
            await (call.reply.event({"type": "ping"}, "ping") if begun else call.reply.heartbeat())
            continue
        if not begun:
            begun = True
            start = {**message, "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(call)}
            await call.reply.event({"type": "message_start", "message": start}, "message_start")
        for delta in part.deltas:
            for event in blocks.events(delta):
                await call.reply.event(event, event["type"])
    for event in blocks.close():
        await call.reply.event(event, event["type"])
    end = {"type": "message_delta", "delta": _end(state), "usage": _usage(call)}
    await call.reply.event(end, "message_delta")
    await call.reply.event({"type": "message_stop"}, "message_stop")
    await call.reply.end()


class _Blocks:
    """Turns deltas into the events of content blocks."""

    def __init__(self):
        self._count = 0
        self._open: tuple[str, int | None] | None = None  # kind of the open block, and number of its call

    def events(self, delta: Delta) -> Iterator[dict]:
        """Yield the events of one delta."""
        if delta.kind is DeltaKind.TOOL_CALL:
            block = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
            yield from self._begin(("tool_use", delta.index), block)
            return
        kind, type, name = _DELTAS[delta.kind]
        if self._open is None or self._open[0] != kind:
            yield from self._begin((kind, None), {"type": kind, name: ""} | _signature(kind))
        yield {"type": "content_block_delta", "index": self._count - 1, "delta": {"type": type, name: delta.text}}

    def close(self) -> Iterator[dict]:
        """Yield the end of the open block."""
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._count - 1}
        self._open = None

    def _begin(self, open: tuple[str, int | None], block: dict) -> Iterator[dict]:
        yield from self.close()
        self._open = open
        yield {"type": "content_block_start", "index": self._count, "content_block": block}
        self._count += 1


def _signature(kind: str) -> dict:
    """Return the signature that clients expect in a thinking block; it is empty, because nothing checks it."""
    return {"signature": ""} if kind == "thinking" else {}


def _content(state: ReplyState) -> list[dict]:
    """Return the content blocks of a complete reply."""
    reply, blocks = state.reply(), []
    if reply.reasoning_content:
        blocks.append({"type": "thinking", "thinking": reply.reasoning_content, "signature": ""})
    if reply.content:
        blocks.append({"type": "text", "text": reply.content})
    for call in reply.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)})
    return blocks


def _input(arguments: str) -> dict:
    """Return the arguments of a call as an object; text that is none, such as that of a cut reply, is one field."""
    value = parse_arguments(arguments or "{}")
    return {"arguments": arguments} if value is None else value


def _end(state: ReplyState) -> dict:
    if isinstance(state.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": state.stop_reason}
    return {"stop_reason": _STOP_REASONS[state.finish_reason], "stop_sequence": None}


def _usage(call: Call) -> dict:
    """Return the usage in Anthropic's shape, in which cached tokens are no input tokens."""
    return {
        "input_tokens": call.prompt_tokens - call.cached_tokens,
        "cache_read_input_tokens": call.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": call.completion_tokens,
    }
