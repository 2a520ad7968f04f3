"""A request of the OpenAI Chat Completions API to a conversation, and a conversation back to its messages."""

from __future__ import annotations

from v4jax.core.errors import UserError
from v4jax.data.chat import fields, json_text
from v4jax.data.chat.conversation import (
    Conversation,
    Message,
    ResponseFormat,
    Tool,
    ToolCall,
    choose_tool,
    effort_of,
)

_ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
_THINKING = ("adaptive", "enabled", "disabled")
_FORMATS = ("text", "json_object", "json_schema", "regex")


def from_chat_completions(body: dict, *, thinking: bool = True) -> Conversation:
    """Return the conversation of a request to /v1/chat/completions.

    Args:
        body: `messages`, `tools`, `tool_choice`, `parallel_tool_calls`, `reasoning_effort`, `thinking`
            ({"type": "enabled" or "disabled"}), `response_format` and `continue_final_message`. A final assistant
            message with "prefix": true is continued too, as in DeepSeek's API. Other fields are not read.
        thinking: mode of a request that does not choose one.

    Raises:
        UserError: a field is missing, has another type or an unknown value, or contradicts another one.
    """
    items = fields.objects(body, "messages")
    messages = [_message(item, path) for path, item in items]
    prefixes = [path for path, item in items if fields.get(item, "prefix", bool, path, False)]
    if prefixes and prefixes != [items[-1][0]]:
        raise UserError(f"{prefixes[0]}.prefix is true; only the final message can be continued")
    continued = fields.get(body, "continue_final_message", bool, "", False) or bool(prefixes)
    thinking, effort = _mode(body, thinking)
    tools, tool_choice = _tools(body)
    return Conversation(
        messages=tuple(m for m in messages if m.role != "system" or m.content),
        thinking=thinking,
        reasoning_effort=effort,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=fields.get(body, "parallel_tool_calls", bool, "", True),
        response_format=_response_format(body, messages),
        continue_final_message=continued,
    )


def to_chat_messages(conversation: Conversation) -> list[dict]:
    """Return the messages of a conversation as a chat template reads them.

    The arguments of a tool call are an object, or text if they are none.
    """
    messages = []
    for message in conversation.messages:
        item: dict = {"role": message.role, "content": message.content}
        if message.reasoning_content is not None:
            item["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            item["tool_calls"] = [_template_call(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            item["tool_call_id"] = message.tool_call_id
        messages.append(item)
    return messages


def to_chat_tools(conversation: Conversation) -> list[dict] | None:
    """Return the tools of a conversation as a chat template reads them; None if it has none."""
    if not conversation.parses_tool_calls:
        return None
    return [
        {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.parameters}}
        for t in conversation.tools
    ]


def parse_thinking(body: dict, thinking: bool, effort: tuple[bool, str | None] | None) -> tuple[bool, str | None]:
    """Return (thinking, effort) of a request with the field `thinking` of the Chat Completions and Messages APIs.

    Args:
        body: the request.
        thinking: mode of a request that does not choose one.
        effort: `effort_of` the effort in the request; None if it has none.
    """
    field = fields.get(body, "thinking", dict, "", None)
    if field is not None:
        kind = fields.choice(field, "type", _THINKING, "thinking")
        thinking = kind != "disabled"
    elif effort is not None:
        thinking = effort[0]
    return thinking, effort[1] if thinking and effort is not None else None


def mentions_json(messages: list[Message]) -> bool:
    """Whether a message has the word json, which a request for a JSON object must have."""
    return any("json" in message.content.lower() for message in messages)


def json_object_format(messages: list[Message]) -> ResponseFormat:
    """Return the format of a request for a JSON object.

    Raises:
        UserError: the messages do not mention JSON. A model that is not told to write JSON may write spaces forever.
    """
    if not mentions_json(messages):
        raise UserError("response_format json_object needs the word 'json' in a message; ask for JSON there")
    return ResponseFormat("json_object")


def parse_function(source: dict, where: str, schema: str = "parameters") -> Tool:
    """Return the tool of a definition.

    Args:
        source: object with `name`, `description`, `strict` and the schema.
        where: path of the object, for messages.
        schema: name of the field of the schema.
    """
    if fields.get(source, "defer_loading", bool, where, False):
        raise UserError(f"{where}.defer_loading is true, which is not supported; send the tool without it")
    parameters = fields.get(source, schema, dict, where, {})
    kind = parameters.get("type", "object")
    if kind != "object":
        raise UserError(f"{where}.{schema}.type is {kind!r}; the arguments of a tool are an object")
    return Tool(
        name=fields.get(source, "name", str, where),
        description=fields.get(source, "description", str, where, ""),
        parameters=parameters,
        strict=fields.get(source, "strict", bool, where, False),
    )


def _message(item: dict, where: str) -> Message:
    role = fields.choice(item, "role", _ROLES, where)
    if role == "assistant":
        calls = tuple(_call(call, path) for path, call in fields.objects(item, "tool_calls", where, ()))
        content = fields.text_content(item, "content", where, ("text",), None)
        if content is None and not calls:
            raise UserError(f"{where} has neither content nor tool_calls; give it one of them")
        reasoning = fields.get(item, "reasoning_content", str, where, None)
        return Message(role, content or "", reasoning, calls)
    content = fields.text_content(item, "content", where, ("text",))
    if role == "tool":
        return Message(role, content, tool_call_id=fields.get(item, "tool_call_id", str, where))
    return Message(role, content)


def _call(item: dict, where: str) -> ToolCall:
    function = fields.get(item, "function", dict, where)
    return ToolCall(
        id=fields.get(item, "id", str, where),
        name=fields.get(function, "name", str, f"{where}.function"),
        arguments=fields.get(function, "arguments", str, f"{where}.function"),
    )


def _template_call(call: ToolCall) -> dict:
    arguments = json_text.parse_arguments(call.arguments)
    function = {"name": call.name, "arguments": call.arguments if arguments is None else arguments}
    return {"type": "function", "id": call.id, "function": function}


def _mode(body: dict, thinking: bool) -> tuple[bool, str | None]:
    effort = body.get("reasoning_effort")
    return parse_thinking(body, thinking, None if effort is None else effort_of(effort))


def _tools(body: dict) -> tuple[tuple[Tool, ...], str]:
    tools = []
    for path, item in fields.objects(body, "tools", default=()):
        fields.choice(item, "type", ("function",), path)
        tools.append(parse_function(fields.get(item, "function", dict, path), f"{path}.function"))
    field = body.get("tool_choice")
    if isinstance(field, dict):
        fields.choice(field, "type", ("function",), "tool_choice")
        name = fields.get(fields.get(field, "function", dict, "tool_choice"), "name", str, "tool_choice.function")
        return choose_tool(tuple(tools), name)
    return tuple(tools), fields.choice(body, "tool_choice", ("auto", "none", "required"), "", "auto")


def _response_format(body: dict, messages: list[Message]) -> ResponseFormat:
    field = fields.get(body, "response_format", dict, "", {"type": "text"})
    kind = fields.choice(field, "type", _FORMATS, "response_format")
    if kind == "json_object":
        return json_object_format(messages)
    if kind == "json_schema":
        holder = fields.get(field, "json_schema", dict, "response_format")
        return ResponseFormat(kind, schema=fields.get(holder, "schema", dict, "response_format.json_schema"))
    if kind == "regex":
        return ResponseFormat(kind, regex=fields.get(field, "regex", str, "response_format"))
    return ResponseFormat()
