"""One conversation in the form that every API protocol is converted to and every encoding reads."""

from __future__ import annotations

import dataclasses

from v4jax.core.errors import UserError, suggest

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
TOOL_CHOICES = ("auto", "none", "required")
# API value of reasoning_effort: (thinking, effort). The effort names are those of the V4 and V4.1 encodings.
EFFORTS = {
    "none": (False, None),
    "minimal": (True, "low"),
    "low": (True, "low"),
    "medium": (True, "high"),
    "high": (True, "high"),
    "xhigh": (True, "xhigh"),
    "max": (True, "max"),
    "ultra": (True, "max"),
}


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a tool in an assistant message.

    Attributes:
        id: name of the call, which the tool result repeats.
        name: name of the tool.
        arguments: text, by convention a JSON object. Other text is kept as it is.
    """

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Message:
    """A message.

    Attributes:
        role: one of ROLES. The encoding of V4 has a developer message as a user message, V4.1 as a system message.
        content: text.
        reasoning_content: reasoning of an assistant message; None if it has none.
        tool_calls: calls of an assistant message.
        tool_call_id: id of the call that a tool message answers.
    """

    role: str
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool that the model may call.

    Attributes:
        name: letters, digits, "_" and "-".
        description: text for the model.
        parameters: JSON schema of the arguments.
        strict: the request asks for arguments that satisfy the schema; constrained decoding enforces it.
    """

    name: str
    description: str = ""
    parameters: dict = dataclasses.field(default_factory=dict)
    strict: bool = False


@dataclasses.dataclass(frozen=True)
class ResponseFormat:
    """The format that the answer must have.

    Attributes:
        type: "text", "json_object", "json_schema" or "regex".
        schema: JSON schema of "json_schema".
        regex: regular expression of "regex".
    """

    type: str = "text"
    schema: dict | bool | None = None
    regex: str | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages and everything else of a request that changes the prompt.

    Attributes:
        messages: messages in order.
        thinking: the model reasons before it answers.
        reasoning_effort: "low", "high", "xhigh" or "max"; None means the default of the model, which is "high".
        tools: tools that the model may call. With `tool_choice` "none" they are not in the prompt.
        tool_choice: one of TOOL_CHOICES. "required" ends the prompt inside a block of tool calls.
        parallel_tool_calls: the reply may have several calls. The prompt does not depend on it; constrained decoding
            enforces it.
        response_format: format of the answer.
        continue_final_message: the last message is the beginning of an assistant's reply, which the model continues.
    """

    messages: tuple[Message, ...]
    thinking: bool = True
    reasoning_effort: str | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat()
    continue_final_message: bool = False

    def __post_init__(self):
        if not self.messages:
            raise UserError("messages is empty; send at least one message")
        for i, message in enumerate(self.messages):
            if message.role not in ROLES:
                raise UserError(f"messages[{i}].role is {message.role!r}; {suggest(message.role, ROLES)}")
        _check_tool_results(self.messages)
        _check_tools(self)
        if self.continue_final_message:
            _check_continuation(self)

    @property
    def parses_tool_calls(self) -> bool:
        """The reply may contain tool calls."""
        return bool(self.tools) and self.tool_choice != "none"


def normalize(conversation: Conversation) -> Conversation:
    """Return `conversation` with the reasoning that its mode has, and without tools that the model may not call.

    In thinking mode, missing reasoning of assistant messages becomes "". Otherwise all reasoning is dropped.
    """
    messages = []
    for message in conversation.messages:
        if message.role == "assistant":
            reasoning = (message.reasoning_content or "") if conversation.thinking else None
            message = dataclasses.replace(message, reasoning_content=reasoning)
        messages.append(message)
    tools = conversation.tools if conversation.parses_tool_calls else ()
    choice = conversation.tool_choice if conversation.tools else "auto"
    return dataclasses.replace(conversation, messages=tuple(messages), tools=tools, tool_choice=choice)


def choose_tool(tools: tuple[Tool, ...], name: str) -> tuple[tuple[Tool, ...], str]:
    """Return the only tool that a request with a named tool choice may call, and the choice "required".

    Without tools the name has no meaning, and the choice is "auto".

    Raises:
        UserError: no tool has this name.
    """
    if not tools:
        return (), "auto"
    chosen = tuple(tool for tool in tools if tool.name == name)
    if not chosen:
        raise UserError(f"tool_choice names {name!r}, which is not in tools; {suggest(name, [t.name for t in tools])}")
    return chosen, "required"


def effort_of(value: object) -> tuple[bool, str | None]:
    """Return (thinking, effort) of an API value of reasoning_effort.

    Raises:
        UserError: the value is none of EFFORTS.
    """
    if not isinstance(value, str) or value not in EFFORTS:
        raise UserError(f"reasoning_effort is {value!r}; {suggest(str(value), list(EFFORTS))}")
    return EFFORTS[value]


def _check_tool_results(messages: tuple[Message, ...]) -> None:
    """Raise UserError unless the results of every assistant message follow it, one for each call."""
    open_ids: list[str] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if message.role == "tool":
            if not open_ids and (i == 0 or messages[i - 1].role != "tool"):
                raise UserError(f"{where} is a tool result, but no assistant message with tool_calls precedes it")
            if message.tool_call_id not in open_ids:
                raise UserError(
                    f"{where}.tool_call_id {message.tool_call_id!r} names no open call of the message before"
                )
            open_ids.remove(message.tool_call_id)
            continue
        if open_ids:
            break
        open_ids = [call.id for call in message.tool_calls]
        if len(set(open_ids)) < len(open_ids):
            raise UserError(f"{where}.tool_calls has an id twice; give every call its own id")
    if open_ids:
        raise UserError(
            f"the tool call {open_ids[0]!r} has no result; a tool message must follow for each tool_call_id"
        )


def _check_tools(conversation: Conversation) -> None:
    choice = conversation.tool_choice
    if choice not in TOOL_CHOICES:
        raise UserError(f"tool_choice is {choice!r}; {suggest(choice, TOOL_CHOICES)}")
    names = [tool.name for tool in conversation.tools]
    for name in names:
        if not name or not all(c.isascii() and (c.isalnum() or c in "_-") for c in name):
            raise UserError(f"the tool name {name!r} has other characters than letters, digits, '_' and '-'")
    if len(set(names)) < len(names):
        raise UserError("two tools have the same name; give every tool its own name")
    if conversation.thinking and choice == "required" and conversation.tools:
        raise UserError("tool_choice 'required' needs chat mode; turn thinking off")


def _check_continuation(conversation: Conversation) -> None:
    last = conversation.messages[-1]
    if last.role != "assistant" or last.tool_calls:
        raise UserError("only a final assistant message without tool_calls can be continued")
    if conversation.tools and conversation.tool_choice == "required":
        raise UserError("a request that continues an assistant message cannot require a tool call")
    if conversation.response_format.type == "json_object":
        raise UserError("a request that continues an assistant message cannot have response_format json_object")
