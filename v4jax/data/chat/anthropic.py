"""A request of the Anthropic Messages API to a conversation."""

from __future__ import annotations

import json

from v4jax.core.errors import UserError
from v4jax.data.chat import fields
from v4jax.data.chat.chat_completions import parse_function, parse_thinking
from v4jax.data.chat.conversation import Conversation, Message, Tool, ToolCall, choose_tool, effort_of

_ROLES = ("user", "assistant", "system")
_REMINDER = "<system-reminder>\n{}\n</system-reminder>"
_CHOICES = ("auto", "any", "tool", "none")


def from_messages(body: dict, *, thinking: bool = True, wrap_system: bool = False) -> Conversation:
    """Return the conversation of a request to /v1/messages or /v1/messages/count_tokens.

    Args:
        body: `messages`, `system`, `tools`, `tool_choice`, `thinking` and `output_config.effort`. Other fields are not
            read. The tool choice "any" is "auto", as in DeepSeek's converter, because the thinking mode knows no
            required call.
        thinking: mode of a request that does not choose one.
        wrap_system: system messages between the others become user messages inside <system-reminder>. The encoding of
            V4 has no place for them.

    Raises:
        UserError: a field is missing, has another type or an unknown value, or contradicts another one.
    """
    messages: list[Message] = []
    system = fields.text_content(body, "system", "", ("text",), None)
    if system is not None:
        messages.append(Message("system", system))
    for where, item in fields.objects(body, "messages"):
        for message in _messages(item, where):
            if message.role == "system" and wrap_system:
                if message.content:
                    messages.append(Message("user", _REMINDER.format(message.content)))
            else:
                messages.append(message)
    output = fields.get(body, "output_config", dict, "", {})
    effort = None if output.get("effort") is None else effort_of(output["effort"])
    thinking, effort = parse_thinking(body, thinking, effort)
    tools = tuple(_tool(item, path) for path, item in fields.objects(body, "tools", default=()))
    field = fields.get(body, "tool_choice", dict, "", {"type": "auto"})
    kind = fields.choice(field, "type", _CHOICES, "tool_choice")
    tool_choice = "none" if kind == "none" else "auto"
    if kind == "tool":
        tools, tool_choice = choose_tool(tools, fields.get(field, "name", str, "tool_choice"))
    return Conversation(
        messages=tuple(messages),
        thinking=thinking,
        reasoning_effort=effort,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=not fields.get(field, "disable_parallel_tool_use", bool, "tool_choice", False),
    )


def _tool(item: dict, where: str) -> Tool:
    if fields.get(item, "type", str, where, None) is not None:
        raise UserError(f"{where} is a server tool; this server runs none, so define a tool by name and input_schema")
    fields.get(item, "input_schema", dict, where)
    return parse_function(item, where, schema="input_schema")


def _messages(item: dict, where: str) -> list[Message]:
    """Return the messages of one item. Each block of a user is one message; the blocks of an assistant are one."""
    role = fields.choice(item, "role", _ROLES, where)
    if isinstance(item.get("content"), str):
        return [Message(role, item["content"])]
    blocks = fields.objects(item, "content", where)
    if not blocks and role != "system":
        raise UserError(f"{where}.content is empty; give it text or a list of blocks")
    if role == "assistant":
        return [_assistant(blocks)]
    if role == "system":
        return [Message(role, fields.text_content(item, "content", where, ("text",)))]
    return [_user_block(block, path) for path, block in blocks]


def _user_block(block: dict, where: str) -> Message:
    kind = fields.choice(block, "type", ("text", "tool_result"), where)
    if kind == "text":
        return Message("user", fields.get(block, "text", str, where))
    content = fields.text_content(block, "content", where, ("text",), "")
    return Message("tool", content, tool_call_id=fields.get(block, "tool_use_id", str, where))


def _assistant(blocks: list[tuple[str, dict]]) -> Message:
    content, thoughts, calls = "", [], []
    for where, block in blocks:
        kind = fields.choice(block, "type", ("text", "thinking", "tool_use"), where)
        if calls and kind != "tool_use":
            raise UserError(f"{where} follows a tool_use block; its tool_result must follow in the next message")
        if kind == "text":
            text = fields.get(block, "text", str, where)
            content = f"{content}\n\n{text}" if content else text
        elif kind == "thinking":
            thoughts.append(fields.get(block, "thinking", str, where))
        else:
            arguments = json.dumps(fields.get(block, "input", dict, where), ensure_ascii=False)
            calls.append(
                ToolCall(fields.get(block, "id", str, where), fields.get(block, "name", str, where), arguments)
            )
    return Message("assistant", content, "\n\n".join(thoughts) if thoughts else None, tuple(calls))
