"""The three API protocols against DeepSeek's own converter and renderer."""

import functools
import json

import pytest

from tests.data.chat import corpus, oracle
from v4jax.core.errors import UserError
from v4jax.data.chat import encoding
from v4jax.data.chat.anthropic import from_messages
from v4jax.data.chat.chat_completions import from_chat_completions
from v4jax.data.chat.responses import from_responses

ROWS = 400  # requests of each protocol, most of which are valid
# The converter of the oracle refuses a continued message after tool calls; the encoding itself has no such rule.
NO_TOOLS_BEFORE_PREFIX = "Function call should not be used with prefix"


def _ours(protocol: str, version: str):
    wrap = {"wrap_system": version == "v4"} if protocol == "Messages" else {}
    converters = {"ChatCompletion": from_chat_completions, "Responses": from_responses, "Messages": from_messages}
    return functools.partial(converters[protocol], **wrap)


def _bodies(protocol: str) -> list[dict]:
    generator = corpus.Generator(seed=14)
    make = {"ChatCompletion": "chat_completion", "Responses": "responses", "Messages": "messages"}[protocol]
    return [getattr(generator, make)() for _ in range(ROWS)]


@pytest.mark.parametrize("version", ["v4", "v4.1"])
@pytest.mark.parametrize("protocol", ["ChatCompletion", "Responses", "Messages"])
def test_prompt_of_a_request_equals_the_oracles(protocol, version):
    valid = 0
    for body in _bodies(protocol):
        try:
            expected = oracle.render(protocol, body, version)
        except (ValueError, oracle.recipe.ConversionError) as error:
            if NO_TOOLS_BEFORE_PREFIX not in str(error):
                with pytest.raises(UserError):
                    _ours(protocol, version)(body)
            continue
        if not oracle.convert(protocol, body, version).conversation.messages:
            continue  # the oracle drops empty system messages and renders no message at all; v4jax refuses that
        valid += 1
        parts = encoding.render(_ours(protocol, version)(body), encoding.VERSIONS[version])
        specials = [part.token for part in parts if isinstance(part, encoding.Special)]
        assert (encoding.text_of(parts), specials) == expected, json.dumps(body, ensure_ascii=False)
    assert valid > ROWS * 0.6


USER = {"role": "user", "content": "hi"}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "x"}
ASSISTANT = {"role": "assistant", "content": None, "tool_calls": [CALL]}
CHAT_MODE = {"thinking": {"type": "disabled"}}


@pytest.mark.parametrize(
    "body, complaint",
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": 3}, "messages is a number"),
        ({"messages": [3]}, "messages[0] is a number"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is null"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "did you mean 'user'?"),
        ({"messages": [{"role": "user", "content": 3}]}, "text or a list of text blocks"),
        ({"messages": [{"role": "user", "content": [{"type": "zz"}]}]}, "messages[0].content[0].type is 'zz'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "neither content nor tool_calls"),
        ({"messages": [USER, RESULT]}, "no assistant message with tool_calls precedes it"),
        ({"messages": [USER, ASSISTANT]}, "has no result"),
        ({"messages": [USER, ASSISTANT, USER, RESULT]}, "has no result"),
        ({"messages": [USER, ASSISTANT, RESULT | {"tool_call_id": "9"}]}, "names no open call"),
        ({"messages": [USER, ASSISTANT, RESULT, RESULT]}, "names no open call"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [CALL, CALL]}, RESULT, RESULT]}, "an id twice"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "prefix": True}, USER]}, "only the final message"),
        ({"messages": [USER], "reasoning_effort": "hgh"}, "did you mean 'high'?"),
        ({"messages": [USER], "reasoning_effort": 3}, "reasoning_effort is 3"),
        ({"messages": [USER], "thinking": {"type": "on"}}, "thinking.type is 'on'"),
        ({"messages": [USER], "tools": [{"type": "zz"}]}, "tools[0].type is 'zz'"),
        ({"messages": [USER], "tools": [{"type": "function", "function": {"name": "a b"}}]}, "other characters"),
        ({"messages": [USER], "tools": [{"type": "function", "function": FUNCTION}] * 2}, "the same name"),
        (
            {
                "messages": [USER],
                "tools": [{"type": "function", "function": FUNCTION | {"parameters": {"type": "string"}}}],
            },
            "the arguments of a tool are an object",
        ),
        (
            {"messages": [USER], "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"},
            "turn thinking off",
        ),
        (
            {
                "messages": [USER],
                "tools": [{"type": "function", "function": FUNCTION}],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
                **CHAT_MODE,
            },
            "tool_choice names 'g'",
        ),
        ({"messages": [USER], "response_format": {"type": "json_object"}}, "the word 'json'"),
        ({"messages": [USER], "response_format": {"type": "regex"}}, "response_format.regex is missing"),
    ],
)
def test_chat_completion_refuses_what_the_oracle_refuses(body, complaint):
    with pytest.raises(UserError) as error:
        from_chat_completions(body)
    assert complaint in str(error.value) and "\n" not in str(error.value)
    assert oracle.is_refused("ChatCompletion", body)


@pytest.mark.parametrize(
    "body, complaint",
    [
        ({}, "input is missing"),
        ({"input": [{"type": "function_call_output", "call_id": "1", "output": "x"}]}, "no assistant message"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role is 'tool'"),
        ({"input": "x", "reasoning": {"effort": "zz"}}, "reasoning_effort is 'zz'"),
        ({"input": "x", "text": {"format": {"type": "json_object"}}}, "the word 'json'"),
    ],
)
def test_responses_refuses_what_the_oracle_refuses(body, complaint):
    with pytest.raises(UserError) as error:
        from_responses(body)
    assert complaint in str(error.value)
    assert oracle.is_refused("Responses", body)


@pytest.mark.parametrize(
    "body, complaint",
    [
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content is empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]},
            "no assistant message",
        ),
        ({"messages": [USER], "tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0] is a server tool"),
        ({"messages": [USER], "tools": [{"name": "f"}]}, "input_schema is missing"),
        ({"messages": [USER], "tool_choice": {"type": "zz"}}, "tool_choice.type is 'zz'"),
    ],
)
def test_messages_refuses_what_the_oracle_refuses(body, complaint):
    with pytest.raises(UserError) as error:
        from_messages(body)
    assert complaint in str(error.value)
    assert oracle.is_refused("Messages", body | {"max_tokens": 5})


def test_images_and_deferred_tools_are_refused():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(UserError, match="text blocks"):
        from_chat_completions({"messages": [{"role": "user", "content": [image]}]})
    with pytest.raises(UserError, match="text blocks"):
        from_responses({"input": [{"role": "user", "content": [{"type": "input_image"}]}]})
    with pytest.raises(UserError, match="type is 'image'"):
        from_messages({"messages": [{"role": "user", "content": [{"type": "image"}]}]})
    with pytest.raises(UserError, match="system is a number"):
        from_messages({"messages": [USER], "system": 3})
    with pytest.raises(UserError, match="define the tool as a function"):
        from_responses({"input": "x", "tools": [{"type": "namespace", "name": "n", "tools": []}]})
    with pytest.raises(UserError, match="defer_loading"):
        from_responses({"input": "x", "tools": [{"type": "function", "name": "f", "defer_loading": True}]})


def test_parallel_tool_calls_reach_the_conversation():
    assert from_chat_completions({"messages": [USER]}).parallel_tool_calls
    assert not from_chat_completions({"messages": [USER], "parallel_tool_calls": False}).parallel_tool_calls
    assert not from_responses({"input": "x", "parallel_tool_calls": False}).parallel_tool_calls
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert not from_messages({"messages": [USER], "tool_choice": choice}).parallel_tool_calls


def test_responses_keeps_the_order_of_calls():
    calls = [{"type": "function_call", "call_id": i, "name": "f", "arguments": "{}"} for i in "ba"]
    outputs = [{"type": "function_call_output", "call_id": i, "output": i} for i in "ab"]
    conversation = from_responses({"input": [{"role": "user", "content": "x"}, *calls, *outputs]})
    assert [call.id for call in conversation.messages[1].tool_calls] == ["b", "a"]
    text = encoding.text_of(encoding.render(conversation, encoding.V4))
    assert text.index("<tool_result>b") < text.index("<tool_result>a")
