"""A request of the OpenAI Responses API to a conversation."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

from v4jax.core.errors import UserError
from v4jax.data.chat import fields
from v4jax.data.chat.chat_completions import json_object_format, parse_function
from v4jax.data.chat.conversation import (
    Conversation,
    Message,
    ResponseFormat,
    Tool,
    ToolCall,
    choose_tool,
    effort_of,
)

_ROLES = ("user", "assistant", "system", "developer")
_TEXT = ("input_text", "output_text")
_CALLS = ("function_call", "custom_tool_call")
_OUTPUTS = ("function_call_output", "custom_tool_call_output")


def from_responses(body: dict, *, thinking: bool = True) -> Conversation:
    """Return the conversation of a request to /v1/responses.

    Args:
        body: `input`, `instructions`, `tools`, `tool_choice`, `parallel_tool_calls`, `reasoning` and `text.format`.
            Input items that have no text, such as item references, and server tools such as web_search are
            dropped, as in DeepSeek's converter. Other fields are not read.
        thinking: mode of a request that does not choose one.

    Raises:
        UserError: a field is missing, has another type or an unknown value, or contradicts another one.
    """
    messages = _input(body)
    instructions = fields.get(body, "instructions", str, "", None)
    if instructions:
        messages = [Message("system", instructions), *messages]
    reasoning = fields.get(body, "reasoning", dict, "", {})
    effort = None
    if reasoning.get("effort") is not None:
        thinking, effort = effort_of(reasoning["effort"])
    tools, tool_choice = _tools(body)
    return Conversation(
        messages=tuple(messages),
        thinking=thinking,
        reasoning_effort=effort,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=fields.get(body, "parallel_tool_calls", bool, "", True),
        response_format=_response_format(body, messages),
    )


def _input(body: dict) -> list[Message]:
    if isinstance(body.get("input"), str):
        return [Message("user", body["input"])]
    builder = _Builder()
    for where, item in fields.objects(body, "input"):
        builder.add(item, where)
    return builder.messages()


class _Builder:
    """Joins the items of the input to messages. Reasoning, text and calls in this order are one assistant message."""

    def __init__(self):
        self._messages: list[Message] = []

    def add(self, item: dict, where: str) -> None:
        """Add the input item at the path `where`."""
        kind = fields.get(item, "type", str, where, "message")
        if kind == "message":
            self._message(item, where)
        elif kind == "reasoning":
            parts = fields.objects(item, "content", where, ())
            self._reasoning("\n".join(fields.get(part, "text", str, path) for path, part in parts))
        elif kind in _CALLS:
            self._call(item, where, kind)
        elif kind in _OUTPUTS:
            content = fields.text_content(item, "output", where, _TEXT)
            self._messages.append(Message("tool", content, tool_call_id=fields.get(item, "call_id", str, where)))

    def messages(self) -> list[Message]:
        """Return the messages."""
        return self._messages

    def _assistant(self, is_open: Callable[[Message], bool]) -> Message:
        """Return the last message if it is an assistant's and `is_open`, else a new one."""
        if not self._messages or self._messages[-1].role != "assistant" or not is_open(self._messages[-1]):
            self._messages.append(Message("assistant"))
        return self._messages[-1]

    def _update(self, **changes) -> None:
        self._messages[-1] = dataclasses.replace(self._messages[-1], **changes)

    def _message(self, item: dict, where: str) -> None:
        role = fields.choice(item, "role", _ROLES, where)
        content = fields.text_content(item, "content", where, _TEXT)
        if role != "assistant":
            self._messages.append(Message(role, content))
            return
        message = self._assistant(lambda last: not last.tool_calls)
        self._update(content="\n\n".join(text for text in (message.content, content) if text))

    def _reasoning(self, text: str) -> None:
        if text:
            message = self._assistant(lambda last: not last.tool_calls and not last.content)
            before = message.reasoning_content
            self._update(reasoning_content=text if before is None else f"{before}\n{text}")

    def _call(self, item: dict, where: str, kind: str) -> None:
        message = self._assistant(lambda last: True)
        if kind == "function_call":
            arguments = fields.get(item, "arguments", str, where)
        else:
            text = fields.get(item, "input", str, where)
            arguments = json.dumps({"input": text}, ensure_ascii=False, separators=(",", ":"))
        call = ToolCall(fields.get(item, "call_id", str, where), fields.get(item, "name", str, where), arguments)
        self._update(tool_calls=(*message.tool_calls, call))


def _tools(body: dict) -> tuple[tuple[Tool, ...], str]:
    tools = []
    for path, item in fields.objects(body, "tools", default=()):
        kind = fields.get(item, "type", str, path)
        if kind in ("custom", "namespace"):
            raise UserError(f"{path}.type is {kind!r}; define the tool as a function")
        if kind == "function":
            tools.append(parse_function(item, path))
    tools = tuple(tools)
    field = body.get("tool_choice")
    if isinstance(field, dict):
        fields.choice(field, "type", ("function",), "tool_choice")
        return choose_tool(tools, fields.get(field, "name", str, "tool_choice"))
    return tools, fields.choice(body, "tool_choice", ("auto", "none", "required"), "", "auto")


def _response_format(body: dict, messages: list[Message]) -> ResponseFormat:
    text = fields.get(body, "text", dict, "", {})
    field = fields.get(text, "format", dict, "text", {"type": "text"})
    kind = fields.choice(field, "type", ("text", "json_object", "json_schema"), "text.format")
    if kind == "json_object":
        return json_object_format(messages)
    if kind == "json_schema":
        return ResponseFormat(kind, schema=fields.get(field, "schema", dict, "text.format"))
    return ResponseFormat()
