"""The reply decoder: handwritten replies, any way of cutting them, and the stream parser of the oracle."""

import json
import random

import hypothesis
import pytest
from hypothesis import strategies as st

from v4jax.data.chat import decoding, encoding
from v4jax.data.chat.conversation import Conversation, Message, Tool, ToolCall
from v4jax.data.chat.decoding import DeltaKind, ReplyDecoder, Start

CALLS_V4 = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="true">x"é\n</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="b" string="false">[1, {"c": null}]</｜DSML｜parameter>\n'
    '</｜DSML｜invoke>\n<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
CALLS_V4_1 = CALLS_V4.replace("tool_calls>", " calls>").replace("invoke", " invoke").replace("parameter", " parameter")
# Pieces of which random replies are made: parts of markers, whole markers, and text.
PIECES = (
    *("<", "</", "<｜", "｜DSML｜", "<｜DSML｜", "</｜DSML｜", "tool_calls>", " calls>", 'invoke name="', "f", '"'),
    *('">\n', 'parameter name="q" ', 'string="true">', 'string="false">', ' parameter name="q" string="true">x y"z'),
    *(
        "</｜DSML｜parameter>",
        "</｜DSML｜ invoke>",
        "</｜DSML｜tool_calls>",
        "</｜DSML｜ calls>",
        "\n",
        "\n\n",
        "</think>",
    ),
    *(
        "<think>",
        "STOP",
        "ST",
        "text",
        "é日",
        "{",
        "}",
        "[",
        "```json\n",
        "```\n",
        "\n```",
        " ",
        "\\",
        "\x01",
        "｜",
        "😀",
    ),
)
STOPS = ([], ["STOP"], ["STOP", "T"], ["\n"], ["</"])


def decode(chunks, start=Start.REASONING, **options):
    decoder = ReplyDecoder(start, **options)
    deltas = [delta for chunk in chunks for delta in decoder.push(chunk)] + decoder.finish()
    reply = decoding.collect(deltas)
    return reply.reasoning_content, reply.content, [(call.name, call.arguments) for call in reply.tool_calls]


def random_reply(draws: random.Random) -> str:
    text = "".join(draws.choice(PIECES) for _ in range(draws.randrange(1, 16)))
    return CALLS_V4[: draws.randrange(60)] + text if draws.random() < 0.5 else text


def cut(text: str, draws: random.Random) -> list[str]:
    chunks = []
    while text:
        length = draws.choice((1, 1, 2, 3, 8, 50))
        chunks, text = [*chunks, text[:length]], text[length:]
    return chunks


@pytest.mark.parametrize("calls", [CALLS_V4, CALLS_V4_1])
def test_decoder_splits_reasoning_content_and_calls(calls):
    reasoning, content, calls = decode(["\n\nthought\n\n</think>\n\nanswer" + calls])
    assert (reasoning, content) == ("thought", "answer")
    assert [name for name, _ in calls] == ["f", "g"]
    assert [json.loads(arguments) for _, arguments in calls] == [{"a": 'x"é\n', "b": [1, {"c": None}]}, {}]


@pytest.mark.parametrize(
    "start, text, expected",
    [
        (Start.CONTENT, "\n\nhello", (None, "hello", [])),
        (Start.CONTENT_CONTINUED, "\n\nhello", (None, "\n\nhello", [])),
        (Start.REASONING, "cut in thought", ("cut in thought", "", [])),
        (Start.REASONING_CONTINUED, "\nmore\n</think>\nanswer", ("\nmore", "answer", [])),
        (Start.REASONING, "thought\n</thi", ("thought\n</thi", "", [])),
        (Start.REASONING, "a</think>b</think>c", ("a", "bc", [])),
        (Start.TOOL_CALLS, '<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n', (None, "", [("f", "{}")])),
        (Start.CONTENT, '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f', (None, "", [])),
        (Start.CONTENT, CALLS_V4[: CALLS_V4.index('"é')], (None, "", [("f", '{"a": "x')])),
        (Start.CONTENT, CALLS_V4 + "after the end", (None, "", decode([CALLS_V4])[2])),
        (Start.OPEN, "\n<think>\nr\n</think>\n\na<think>b", ("r", "a<think>b", [])),
        (Start.OPEN, "\n<thin", (None, "<thin", [])),
        (Start.OPEN, "a<think>b</think>c", (None, "a<think>bc", [])),
        (Start.PLAIN, "\na</think>b", (None, "\na</think>b", [])),
    ],
)
def test_decoder_follows_its_start(start, text, expected):
    assert decode([text], start) == expected


def test_decoder_without_tool_calls_leaves_markup_in_the_content():
    assert decode([CALLS_V4], Start.CONTENT_CONTINUED, parse_tool_calls=False) == (None, CALLS_V4, [])


def test_decoder_accepts_spaces_and_quotes_in_parameter_names():
    text = CALLS_V4.replace('name="a"', 'name="a b"').replace('name="b"', 'name="b"c\\"')
    assert json.loads(decode([text], Start.CONTENT)[2][0][1]) == {"a b": 'x"é\n', 'b"c\\': [1, {"c": None}]}


def test_decoder_streams_arguments_as_they_arrive():
    decoder = ReplyDecoder(Start.CONTENT, new_id=lambda: "id-1")
    head = CALLS_V4[: CALLS_V4.index('x"é')]
    deltas = decoder.push(head)
    assert [(d.kind, d.index, d.id, d.name) for d in deltas][0] == (DeltaKind.TOOL_CALL, 0, "id-1", "f")
    assert "".join(d.text for d in deltas) == '{"a": "'
    assert [(d.kind, d.index, d.text) for d in decoder.push('x"')] == [(DeltaKind.ARGUMENTS, 0, 'x\\"')]
    assert decoder.push("</") == []
    assert [d.text for d in decoder.push("b")] == ["</b"]


def test_decoder_emits_text_at_once_unless_a_marker_may_follow():
    decoder = ReplyDecoder(Start.REASONING)
    assert [d.text for d in decoder.push("some words")] == ["some words"]
    assert [d.text for d in decoder.push(" and\n")] == [" and"]
    assert decoder.push("</thi") == []
    assert [d.text for d in decoder.push("s")] == ["\n</this"]


def test_decoder_ends_at_a_stop_text_of_the_answer_only():
    decoder = ReplyDecoder(Start.REASONING, stop=["STOP"])
    reply = decoding.collect([*decoder.push("a STOP b</think>c ST"), *decoder.push("OP d"), *decoder.finish()])
    assert (reply.reasoning_content, reply.content, decoder.finished) == ("a STOP b", "c ", True)


def test_decoder_keeps_only_json_of_a_json_answer():
    options = {"start": Start.CONTENT, "json_output": True}
    assert decode(["Here: ```json\n{}\n``` bye"], **options) == (None, " {} ", [])
    assert decode(["Here: [1] tail"], **options) == (None, " [1] tail", [])


@hypothesis.given(
    text=st.lists(st.sampled_from(PIECES), max_size=20).map("".join),
    cuts=st.sets(st.integers(0, 60)),
    start=st.sampled_from(Start),
    stop=st.sampled_from(STOPS),
    json_output=st.booleans(),
)
@hypothesis.settings(deadline=None, max_examples=300)
def test_decoder_result_does_not_depend_on_chunks(text, cuts, start, stop, json_output):
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    chunks = [text[i:j] for i, j in zip(edges, edges[1:], strict=False)]
    options = {"start": start, "stop": stop, "json_output": json_output}
    assert decode(chunks, **options) == decode([text], **options)


def test_decoder_equals_the_stream_parser_of_the_oracle():
    from tests.data.chat import oracle

    stages = oracle.recipe.ThinkingInitialStage
    thinking = {
        Start.REASONING: stages.ReasoningStart,
        Start.REASONING_CONTINUED: stages.ReasoningContinuation,
        Start.CONTENT: None,
        Start.CONTENT_CONTINUED: stages.ContentContinuation,
    }
    draws = random.Random(14)
    for _ in range(3000):
        text = random_reply(draws)
        start = draws.choice([s for s in Start if s not in (Start.PLAIN, Start.OPEN)])
        stop, json_output, parse = draws.choice(STOPS), draws.random() < 0.3, draws.random() < 0.8
        begin = {"thinking_initial_stage": thinking[start]} if start in thinking else {"starts_in_tool_calls": True}
        options = {"parse_tool_calls": parse, "parse_json_output": json_output, "stop_sequences": stop}
        expected = oracle.reply([text], **begin, **options)
        ours = {"stop": stop, "json_output": json_output, "parse_tool_calls": parse}
        assert decode([text], start, **ours) == expected, text
        assert decode(cut(text, draws), start, **ours) == expected, text


@hypothesis.given(
    name=st.text("abc_-", min_size=1),
    arguments=st.dictionaries(
        st.text("ab é", max_size=5),
        st.one_of(st.text('ab"\\\n<é'), st.integers(-9, 9), st.none(), st.lists(st.booleans())),
    ),
    version=st.sampled_from([encoding.V4, encoding.V4_1]),
)
@hypothesis.settings(deadline=None)
def test_decoder_inverts_the_encoding_of_a_call(name, arguments, version):
    call = ToolCall("1", name, json.dumps(arguments))
    messages = (
        Message("user", "x"),
        Message("assistant", "answer", "thought", (call,)),
        Message("tool", tool_call_id="1"),
    )
    prompt = encoding.text_of(encoding.render(Conversation(messages, tools=(Tool(name),)), version))
    reply = prompt.split(encoding.ASSISTANT + encoding.THINK)[1].split(encoding.EOS)[0]
    reasoning, content, calls = decode([reply])
    assert (reasoning, content) == ("thought", "answer")
    assert [(n, json.loads(text)) for n, text in calls] == [(name, arguments)]
