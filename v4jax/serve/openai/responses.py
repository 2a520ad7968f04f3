"""/v1/responses: the Responses API of OpenAI, without state: every request has its whole conversation."""

from __future__ import annotations

from collections.abc import Iterator

from v4jax.data.chat.decoding import Delta, DeltaKind
from v4jax.serve.openai import protocol
from v4jax.serve.openai.endpoint import Call
from v4jax.serve.openai.errors import bad_request
from v4jax.serve.openai.replies import Replies, ReplyState

_STATEFUL = ("previous_response_id", "conversation", "prompt")
_ECHOED = ("instructions", "metadata", "reasoning", "temperature", "top_p", "max_output_tokens", "text")
_PARTS = {DeltaKind.REASONING: "reasoning_text", DeltaKind.CONTENT: "output_text"}


async def responses(call: Call) -> None:
    """Answer a request to /v1/responses."""
    service, body = call.service, call.body
    model = protocol.model_name(body, service.model)
    for name in _STATEFUL:
        if body.get(name) is not None:
            raise bad_request(f"{name} is not supported, because the server stores nothing; send the whole input", name)
    if protocol.flag(body, "background"):
        raise bad_request("background is not supported; leave it out", "background")
    max_tokens = protocol.integer(body, "max_output_tokens", 1)
    stream = protocol.flag(body, "stream")
    options = protocol.sampling_options(body)
    conversation = service.encoder.from_responses(body)
    with service.admit(call, 1):
        replies = await Replies.start(call, conversation, options, max_tokens)
        response = _Response(call, model)
        if stream:
            await _stream(call, replies, response)
        else:
            async for part in replies.parts():
                for _ in response.events(part.deltas if part is not None else []):
                    pass
            for _ in response.close():
                pass
            await call.reply.json(response.object(replies.states[0]))


async def _stream(call: Call, replies: Replies, response: _Response) -> None:
    """Send the response as events."""
    [state] = replies.states
    number = 0

    async def send(events) -> None:
        nonlocal number
        for event in events:
            await call.reply.event({**event, "sequence_number": number}, event["type"])
            number += 1

    begun = [{"type": f"response.{kind}", "response": response.object(state)} for kind in ("created", "in_progress")]
    await send(begun)
    async for part in replies.parts():
        if part is None:
            await call.reply.heartbeat()
        else:
            await send(response.events(part.deltas))
    await send(response.close())
    done = response.object(state)
    await send([{"type": f"response.{done['status']}", "response": done}])
    await call.reply.end()


class _Response:
    """Collects deltas into the output items of a response, and describes each step as events."""

    def __init__(self, call: Call, model: str):
        self._call, self._model = call, model
        self._items: list[dict] = []
        self._open: DeltaKind | None = None  # kind of the open item

    def object(self, state: ReplyState) -> dict:
        """Return the response so far."""
        call, body = self._call, self._call.body
        status = {None: "in_progress", "length": "incomplete"}.get(state.finish_reason, "completed")
        usage = {
            "input_tokens": call.prompt_tokens,
            "input_tokens_details": {"cached_tokens": call.cached_tokens},
            "output_tokens": call.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": call.reasoning_tokens},
            "total_tokens": call.prompt_tokens + call.completion_tokens,
        }
        return {
            "id": f"resp_{call.id}",
            "object": "response",
            "created_at": call.created,
            "status": status,
            "model": self._model,
            "output": [dict(item) for item in self._items],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **{name: body.get(name) for name in _ECHOED},
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else usage,
        }

    def events(self, deltas: list[Delta]) -> Iterator[dict]:
        """Add deltas and yield their events."""
        for delta in deltas:
            if delta.kind is DeltaKind.TOOL_CALL:
                yield from self._begin(delta.kind, self._call_item(delta))
            elif delta.kind is DeltaKind.ARGUMENTS:
                self._items[-1]["arguments"] += delta.text
                yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": delta.text}
            else:
                yield from self._add_text(delta)

    def close(self) -> Iterator[dict]:
        """End the open item and yield its events."""
        if self._open is None:
            return
        item, place = self._items[-1], self._place()
        item["status"] = "completed"
        if self._open is DeltaKind.TOOL_CALL:
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield {"type": "response.function_call_arguments.done", **place, **done}
        else:
            [part] = item["content"]
            at = {**place, "content_index": 0}
            extra = {"logprobs": []} if part["type"] == "output_text" else {}
            yield {"type": f"response.{part['type']}.done", **at, "text": part["text"], **extra}
            yield {"type": "response.content_part.done", **at, "part": part}
        yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": dict(item)}
        self._open = None

    def _add_text(self, delta: Delta) -> Iterator[dict]:
        type = _PARTS[delta.kind]
        if self._open is not delta.kind:
            item, part = self._text_item(delta.kind)
            yield from self._begin(delta.kind, item)
            yield {"type": "response.content_part.added", **self._place(), "content_index": 0, "part": dict(part)}
            item["content"] = [part]
        self._items[-1]["content"][0]["text"] += delta.text
        extra = {"logprobs": []} if type == "output_text" else {}
        yield {"type": f"response.{type}.delta", **self._place(), "content_index": 0, "delta": delta.text, **extra}

    def _begin(self, kind: DeltaKind, item: dict) -> Iterator[dict]:
        yield from self.close()
        self._open = kind
        self._items.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": dict(item)}

    def _text_item(self, kind: DeltaKind) -> tuple[dict, dict]:
        """Return a new item of reasoning or of text, and its part, which it does not have yet."""
        number = len(self._items)
        if kind is DeltaKind.REASONING:
            item = {"id": f"rs_{self._call.id}_{number}", "type": "reasoning", "summary": []}
            return {**item, "content": [], "status": "in_progress"}, {"type": "reasoning_text", "text": ""}
        item = {"id": f"msg_{self._call.id}_{number}", "type": "message", "role": "assistant"}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return {**item, "content": [], "status": "in_progress"}, part

    def _call_item(self, delta: Delta) -> dict:
        names = {"call_id": delta.id, "name": delta.name, "arguments": ""}
        id = f"fc_{self._call.id}_{len(self._items)}"
        return {"id": id, "type": "function_call", **names, "status": "in_progress"}

    def _place(self) -> dict:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
