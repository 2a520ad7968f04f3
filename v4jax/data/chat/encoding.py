"""DeepSeek's own prompt encoding of a conversation, in the versions V4 and V4.1.

DeepSeek publishes no chat template. Its package deepseek-recipe 0.2.0 is the reference of the rules here. The prompt of
V4 collects all system text at its beginning. V4.1 keeps every system message at its place, behind a marker.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

from v4jax.core.errors import UserError
from v4jax.data.chat import json_text
from v4jax.data.chat.conversation import Conversation, Message, Tool, ToolCall, normalize

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
SYSTEM = "<｜System｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"

_TOOLS = """

## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜{calls}>" block like the following:

<｜DSML｜{calls}>
<｜DSML｜{space}invoke name="$TOOL_NAME">
<｜DSML｜{space}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜{space}parameter>
...
</｜DSML｜{space}invoke>
<｜DSML｜{space}invoke name="$TOOL_NAME2">
...
</｜DSML｜{space}invoke>
</｜DSML｜{calls}>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_TOOLS_END = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
_JSON_SCHEMA = """

## Response Format:

You MUST strictly adhere to the following schema to reply:
"""
_JSON_OBJECT_V4 = """

You are a helpful assistant designed to output JSON.
## Response Format:

Reply with JSON object ONLY."""
_JSON_OBJECT_V4_1 = _JSON_SCHEMA + '{"type": "json_object"}'
_EFFORT_HIGH_V4 = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
_EFFORT_MAX_V4 = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the \
problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause \
rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no \
assumption remains unchecked and no error remains undiscovered.

"""
_EFFORT_V4_1 = "Reasoning Effort: {} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"


@dataclasses.dataclass(frozen=True)
class Version:
    """What differs between the encodings of V4 and V4.1.

    Attributes:
        name: "v4" or "v4.1".
        calls: name of the block of tool calls.
        space: text before the names "invoke" and "parameter".
        no_parameters: text between the lines of a call without arguments.
        efforts: text for every effort in thinking mode; None is the default.
        json_object: text of the response format json_object.
        spell_float: spelling of a float64 in JSON.
    """

    name: str
    calls: str
    space: str
    no_parameters: str
    efforts: dict[str | None, str]
    json_object: str
    spell_float: Callable[[float], str]

    @property
    def specials(self) -> tuple[str, ...]:
        """Special tokens of a prompt. A tokenizer without one of them cannot encode for this version."""
        system = (SYSTEM,) if self.name == "v4.1" else ()
        return (BOS, EOS, *system, USER, ASSISTANT, LATEST_REMINDER, THINK, END_THINK, DSML)


_EFFORTS_V4 = {None: _EFFORT_HIGH_V4, "low": "", "max": _EFFORT_MAX_V4}
_EFFORTS_V4 |= {"high": _EFFORT_HIGH_V4, "xhigh": _EFFORT_HIGH_V4}
_EFFORTS_V4_1 = {
    effort: _EFFORT_V4_1.format(number)
    for effort, number in ((None, 75), ("low", 50), ("high", 75), ("xhigh", 75), ("max", 100))
}
V4 = Version("v4", "tool_calls", "", "", _EFFORTS_V4, _JSON_OBJECT_V4, json_text.spell_float_v4)
V4_1 = Version("v4.1", " calls", " ", "\n", _EFFORTS_V4_1, _JSON_OBJECT_V4_1, repr)
VERSIONS = {version.name: version for version in (V4, V4_1)}


@dataclasses.dataclass(frozen=True)
class Special:
    """A special token of a prompt, as opposed to text that merely spells one."""

    token: str


Part = str | Special


def render(conversation: Conversation, version: Version, *, add_generation_prompt: bool = True) -> list[Part]:
    """Return the prompt of a conversation.

    Args:
        conversation: messages, tools and settings.
        version: V4 or V4_1.
        add_generation_prompt: end with the beginning of the next reply. A conversation with `continue_final_message`
            ends inside the final message in any case.

    Returns:
        Parts of the prompt in order. A str is plain text, in which a tokenizer must not recognize special tokens.

    Raises:
        UserError: an effort that the encoding does not have, or a schema that is no JSON or is nested too deeply.
    """
    parts: list[Part] = []
    try:
        for part in _parts(normalize(conversation), version, add_generation_prompt):
            if isinstance(part, Special) or not parts or isinstance(parts[-1], Special):
                parts.append(part)
            else:  # a tokenizer must see the text between two special tokens at once
                parts[-1] += part
    except RecursionError as error:
        raise UserError("a schema in tools or response_format is nested too deeply; simplify it") from error
    return parts


def text_of(parts: list[Part]) -> str:
    """Return a prompt as one text. Special tokens have their spelling."""
    return "".join(part.token if isinstance(part, Special) else part for part in parts)


def _parts(conversation: Conversation, version: Version, add_generation_prompt: bool) -> Iterator[Part]:
    role = "user" if version is V4 else "system"
    messages = tuple(dataclasses.replace(m, role=role) if m.role == "developer" else m for m in conversation.messages)
    yield Special(BOS)
    if version is V4:
        system = "\n\n".join(m.content for m in messages if m.role == "system" and m.content)
        messages = tuple(m for m in messages if m.role != "system")
        yield from _head(conversation, version, system)
    else:
        leading = messages[0].role == "system"
        head = list(_head(conversation, version, messages[0].content if leading else ""))
        if head or leading:
            yield Special(SYSTEM)
            yield from head
        messages = messages[1:] if leading else messages
    before = None
    for turn in _turns(messages):
        # V4.1 keeps only the first of several reminders in a row.
        if version is V4 or not turn[0].role == before == "latest_reminder":
            yield from _turn(turn, conversation, version)
        before = turn[0].role
    if conversation.continue_final_message:
        return
    if add_generation_prompt:
        yield Special(ASSISTANT)
        yield Special(THINK if conversation.thinking else END_THINK)
        if conversation.tool_choice == "required":
            yield "\n\n<"
            yield Special(DSML)
            yield f"{version.calls}>\n"


def _head(conversation: Conversation, version: Version, system: str) -> Iterator[Part]:
    """Yield the effort, the system text, the tools and the response format."""
    if conversation.thinking:
        if conversation.reasoning_effort not in version.efforts:
            raise UserError(f"the encoding has no reasoning effort {conversation.reasoning_effort!r}")
        effort = version.efforts[conversation.reasoning_effort]
        if effort:
            yield effort
    if system:
        yield system
    if conversation.tools:
        yield from _mark(_TOOLS.format(calls=version.calls, space=version.space))
        yield "\n".join(_schema(tool, version) for tool in conversation.tools)
        yield _TOOLS_END
    response = conversation.response_format
    if response.type == "json_schema":
        yield _JSON_SCHEMA + json_text.dumps(response.schema, version.spell_float)
    elif response.type == "json_object":
        yield version.json_object


def _mark(text: str) -> Iterator[Part]:
    """Yield a text of this module with its special tokens marked."""
    for part in re.split(f"({re.escape(DSML)}|{THINK}|{END_THINK})", text):
        yield Special(part) if part in (DSML, THINK, END_THINK) else part


def _schema(tool: Tool, version: Version) -> str:
    fields = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return json_text.dumps(fields, version.spell_float)


def _turns(messages: tuple[Message, ...]) -> list[list[Message]]:
    """Group messages into turns. Tool results and user messages in a row are one turn; other messages are one each.

    Tool results are sorted into the order of the calls.
    """
    turns: list[list[Message]] = []
    for message in messages:
        if message.role in ("user", "tool") and turns and turns[-1][-1].role in ("user", "tool"):
            turns[-1].append(message)
        else:
            turns.append([message])
    order: dict[str | None, int] = {}
    for turn in turns:
        if turn[0].role == "assistant":
            order = {call.id: i for i, call in enumerate(turn[0].tool_calls)}
        results = [message for message in turn if message.role == "tool"]
        results.sort(key=lambda message: order[message.tool_call_id])
        turn[: len(results)] = results  # the results of a valid conversation are the first messages of their turn
    return turns


def _turn(turn: list[Message], conversation: Conversation, version: Version) -> Iterator[Part]:
    message = turn[0]
    if message.role == "system":
        yield Special(SYSTEM)
        yield message.content
    elif message.role == "latest_reminder":
        yield Special(LATEST_REMINDER)
        yield message.content
    elif message.role == "assistant":
        yield from _assistant(message, conversation, version)
    else:
        results = [f"<tool_result>{m.content}</tool_result>" for m in turn if m.role == "tool"]
        texts = [m.content for m in turn if m.role == "user"]
        if version is V4 and texts:
            texts = ["\n\n".join(text for text in texts if text)]
        yield Special(USER)
        yield "\n\n".join(results + texts)


def _assistant(message: Message, conversation: Conversation, version: Version) -> Iterator[Part]:
    """Yield an assistant message. Its reasoning is kept if the conversation has tools or the message is continued."""
    continued = conversation.continue_final_message and message is conversation.messages[-1]
    keeps_reasoning = conversation.thinking and (bool(conversation.tools) or continued)
    yield Special(ASSISTANT)
    if keeps_reasoning:
        yield Special(THINK)
        yield message.reasoning_content
    if not (keeps_reasoning and continued and not message.content):  # else the reasoning itself is continued
        yield Special(END_THINK)
        yield message.content
    if message.tool_calls:
        yield "\n\n<"
        yield Special(DSML)
        yield f"{version.calls}>\n"
        for call in message.tool_calls:
            yield from _call(call, version)
        yield "</"
        yield Special(DSML)
        yield f"{version.calls}>"
    if not continued:
        yield Special(EOS)


def _call(call: ToolCall, version: Version) -> Iterator[Part]:
    yield "<"
    yield Special(DSML)
    yield f'{version.space}invoke name="{call.name}">\n'
    arguments = json_text.parse_arguments(call.arguments)
    arguments = {"arguments": call.arguments} if arguments is None else arguments
    if not arguments:
        yield version.no_parameters
    for name, value in arguments.items():
        is_string = isinstance(value, str)
        yield "<"
        yield Special(DSML)
        yield f'{version.space}parameter name="{name}" string="{"true" if is_string else "false"}">'
        yield value if is_string else json_text.dumps(value, version.spell_float)
        yield "</"
        yield Special(DSML)
        yield f"{version.space}parameter>\n"
    yield "</"
    yield Special(DSML)
    yield f"{version.space}invoke>\n"
