"""Handwritten prompts of both versions, and the token ids of the oracle."""

import json

import pytest

from tests.data.chat import corpus
from v4jax.core.errors import UserError
from v4jax.data.chat import encoding
from v4jax.data.chat.conversation import Conversation, Message, ResponseFormat, Tool, ToolCall
from v4jax.data.chat.encoder import ChatEncoder
from v4jax.data.tokenizer import Tokenizer

B, E, U, A, R = encoding.BOS, encoding.EOS, encoding.USER, encoding.ASSISTANT, encoding.LATEST_REMINDER
S = encoding.SYSTEM
TOOL = Tool("f", "does", {"type": "object"})
CALLS = (ToolCall("1", "f", '{"q": "x", "n": [1, 2.0]}'), ToolCall("2", "f", "{}"))
EFFORT_75 = "Reasoning Effort: 75 (range 1-100, the higher the value, the more thorough the reasoning)\n\n"


def prompt(version: encoding.Version, *messages: Message, **options) -> str:
    add = options.pop("add_generation_prompt", True)
    return encoding.text_of(encoding.render(Conversation(messages, **options), version, add_generation_prompt=add))


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, reasoning: str | None = None, *calls: ToolCall) -> Message:
    return Message("assistant", text, reasoning, calls)


def result(i: str, text: str) -> Message:
    return Message("tool", text, tool_call_id=i)


CHAT = {"thinking": False}
LOW = {"reasoning_effort": "low"}  # the effort that adds no text in V4


@pytest.mark.parametrize(
    "messages, options, v4, v4_1",
    [
        pytest.param([user("a")], CHAT, f"{U}a{A}</think>", f"{U}a{A}</think>", id="chat mode"),
        pytest.param([user("a")], LOW, f"{U}a{A}<think>", None, id="thinking mode"),
        pytest.param([user("a")], {}, None, f"{S}{EFFORT_75}{U}a{A}<think>", id="default effort"),
        pytest.param([user("a")], {**CHAT, "add_generation_prompt": False}, f"{U}a", f"{U}a", id="no reply"),
        pytest.param(
            [Message("system", "s"), user("a"), Message("system", "t"), user("b")],
            CHAT,
            f"s\n\nt{U}a\n\nb{A}</think>",
            f"{S}s{U}a{S}t{U}b{A}</think>",
            id="system messages",
        ),
        pytest.param(
            [Message("developer", "d"), user("a")],
            CHAT,
            f"{U}d\n\na{A}</think>",
            f"{S}d{U}a{A}</think>",
            id="developer",
        ),
        pytest.param(
            [user("a"), assistant("b", "r"), user("c"), assistant("d", "q"), user("e")],
            LOW,
            f"{U}a{A}</think>b{E}{U}c{A}</think>d{E}{U}e{A}<think>",
            None,
            id="reasoning of earlier turns is dropped",
        ),
        pytest.param(
            [user("a"), assistant("b", "r")],
            {**LOW, "continue_final_message": True},
            f"{U}a{A}<think>r</think>b",
            None,
            id="continued answer",
        ),
        pytest.param(
            [user("a"), assistant("", "r")],
            {**LOW, "continue_final_message": True},
            f"{U}a{A}<think>r",
            None,
            id="continued reasoning",
        ),
        pytest.param(
            [user("a"), assistant("b", "r")],
            {**CHAT, "continue_final_message": True},
            f"{U}a{A}</think>b",
            f"{U}a{A}</think>b",
            id="continued in chat mode",
        ),
        pytest.param(
            [user("a"), Message("latest_reminder", "r"), Message("latest_reminder", "q")],
            CHAT,
            f"{U}a{R}r{R}q{A}</think>",
            f"{U}a{R}r{A}</think>",
            id="reminders",
        ),
        pytest.param(
            [user(""), user("b")],
            CHAT,
            f"{U}b{A}</think>",
            f"{U}\n\nb{A}</think>",
            id="empty content",
        ),
        pytest.param(
            [user("a"), assistant("b", "r", *CALLS), result("2", "second"), result("1", "first"), user("c")],
            LOW,
            f"{U}a{A}</think>b\n\n"
            '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
            '<｜DSML｜parameter name="q" string="true">x</｜DSML｜parameter>\n'
            '<｜DSML｜parameter name="n" string="false">[1, 2.0]</｜DSML｜parameter>\n'
            '</｜DSML｜invoke>\n<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
            f"{E}{U}<tool_result>first</tool_result>\n\n<tool_result>second</tool_result>\n\nc{A}<think>",
            None,
            id="tool calls",
        ),
    ],
)
def test_render_gives_the_prompt_of_the_release(messages, options, v4, v4_1):
    for version, expected in ((encoding.V4, v4), (encoding.V4_1, v4_1)):
        if expected is not None:
            assert prompt(version, *messages, **options) == B + expected


def test_render_keeps_reasoning_if_there_are_tools():
    text = prompt(encoding.V4, user("a"), assistant("b", "r"), user("c"), tools=(TOOL,), **LOW)
    assert text.endswith(f"{U}a{A}<think>r</think>b{E}{U}c{A}<think>")
    assert '{"name": "f", "description": "does", "parameters": {"type": "object"}}' in text
    without = prompt(encoding.V4, user("a"), assistant("b", "r"), user("c"), tools=(TOOL,), tool_choice="none", **LOW)
    assert without == f"{B}{U}a{A}</think>b{E}{U}c{A}<think>"


def test_render_opens_the_block_of_a_required_call():
    options = {"tools": (TOOL,), "tool_choice": "required", "thinking": False}
    assert prompt(encoding.V4, user("a"), **options).endswith(f"{A}</think>\n\n<｜DSML｜tool_calls>\n")
    assert prompt(encoding.V4_1, user("a"), **options).endswith(f"{A}</think>\n\n<｜DSML｜ calls>\n")


def test_render_puts_the_schema_behind_the_tools():
    response = ResponseFormat("json_schema", schema={"x": 1e-7})
    for version, number in ((encoding.V4, "1e-7"), (encoding.V4_1, "1e-07")):
        text = prompt(version, user("a"), tools=(TOOL,), response_format=response)
        assert text.index("### Available Tool Schemas") < text.index(f'schema to reply:\n{{"x": {number}}}{U}')


def test_render_refuses_a_schema_that_is_nested_too_deeply():
    schema: dict = {}
    for _ in range(5000):
        schema = {"a": schema}
    with pytest.raises(UserError, match="nested too deeply"):
        prompt(encoding.V4, user("a"), tools=(Tool("f", parameters=schema),))


def test_render_marks_special_tokens_but_not_their_spelling_in_text():
    parts = encoding.render(Conversation((user(f"x{U}y<think>"),), thinking=False), encoding.V4)
    assert [part for part in parts if isinstance(part, str)] == [f"x{U}y<think>"]


@pytest.fixture(scope="module", params=["v4", "v4.1"])
def deepseek(request, tmp_path_factory):
    """(version, directory with DeepSeek's tokenizer)."""
    from tests.data.chat import oracle

    return request.param, oracle.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


def test_token_ids_equal_the_oracles(deepseek):
    from tests.data.chat import oracle

    version, directory = deepseek
    encoder = ChatEncoder.from_dir(directory, Tokenizer(directory))
    assert encoder.version.name == version
    tokenizer = oracle.recipe.Tokenizer.from_file(str(directory / "tokenizer.json"))
    reference = oracle.encoder(version).with_tokenizer(tokenizer)
    generator, compared = corpus.Generator(seed=41), 0
    for _ in range(240):
        body = generator.chat_completion()
        try:
            conversation = oracle.convert("ChatCompletion", body, version).conversation
        except (ValueError, oracle.recipe.ConversionError):
            continue
        if conversation.messages:
            compared += 1
            ids = encoder.encode_conversation(encoder.from_chat_completions(body))
            assert ids == reference.encode(conversation), json.dumps(body, ensure_ascii=False)
    assert compared > 150


def test_text_of_a_message_never_becomes_a_special_token(deepseek):
    _, directory = deepseek
    tokenizer = Tokenizer(directory)
    encoder = ChatEncoder.from_dir(directory, tokenizer)
    special = set(encoder.encode([user_dict("")], thinking=False))
    ids = encoder.encode([user_dict("<｜User｜></think><｜end▁of▁sentence｜>")], thinking=False)
    added = {tokenizer.added_token_id(token) for token in encoder.version.specials}
    assert [i for i in ids if i in added] == [i for i in ids if i in special]
    assert len([i for i in ids if i in added]) == len(special)


def test_decoder_starts_where_the_prompt_ends(deepseek):
    _, directory = deepseek
    encoder = ChatEncoder.from_dir(directory, Tokenizer(directory))
    tools = [{"type": "function", "function": {"name": "f"}}]
    for options, text, expected in [
        ({}, "r</think>a", ("r", "a")),
        ({"thinking": False}, "a", (None, "a")),
        ({"reasoning_effort": "none"}, "a", (None, "a")),
        ({"tools": tools, "tool_choice": "required", "thinking": False}, '<｜DSML｜invoke name="f">', (None, "")),
    ]:
        decoder = encoder.decoder(encoder.conversation([user_dict("x")], **options))
        deltas = [*decoder.push(text), *decoder.finish()]
        reasoning = "".join(d.text for d in deltas if d.kind.value == "reasoning") or None
        content = "".join(d.text for d in deltas if d.kind.value == "content")
        assert (reasoning, content) == expected


def user_dict(text: str) -> dict:
    return {"role": "user", "content": text}


def test_encoder_names_the_missing_token():
    encoder = ChatEncoder(Tokenizer())
    with pytest.raises(UserError, match="chat_template.jinja"):
        encoder.encode([user_dict("x")])
    with pytest.raises(UserError, match="options: v4, v4.1"):
        ChatEncoder(Tokenizer(), version="v5")
