"""/v1/chat/completions with the client of OpenAI."""

import json

import pytest

from tests.serve.openai.playback import TOOL, TOOL_CALL, playing

openai = pytest.importorskip("openai", reason="the client of OpenAI is missing")
pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "To be, or not"}]
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_and_status(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert server.client.get(path).status_code == 200
    assert "v4jax_num_requests_running" in server.client.get("/metrics").text


def test_a_stream_joins_to_the_reply(client):
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=12, **GREEDY)
    [choice] = reply.choices
    assert choice.finish_reason == "length" and choice.message.role == "assistant"
    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12, stream=True, **GREEDY))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.reasoning_content or "" for delta in deltas if hasattr(delta, "reasoning_content")) == (
        choice.message.reasoning_content
    )
    assert reply.usage.completion_tokens == 12 and reply.usage.completion_tokens_details.reasoning_tokens == 12


def test_reasoning_text_and_tool_calls_of_a_reply(server, client, monkeypatch):
    pieces = ["th", "ink</th", "ink>Hi", " there\n\n", *TOOL_CALL]
    tools = [{"type": "function", "function": TOOL}]
    with playing(server.llm, monkeypatch, *pieces):
        reply = client.chat.completions.create(model="tiny", messages=MESSAGES, tools=tools)
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=MESSAGES, tools=tools, stream=True, stream_options={"include_usage": True}
            )
        )
    [choice] = reply.choices
    assert choice.message.reasoning_content == "think" and choice.message.content.strip() == "Hi there"
    [call] = choice.message.tool_calls
    assert call.function.name == "find" and json.loads(call.function.arguments) == {"q": "ä x", "n": 3}
    assert choice.finish_reason == "tool_calls" and reply.usage.prompt_tokens_details.cached_tokens == 2
    assert 0 < reply.usage.completion_tokens_details.reasoning_tokens <= 3
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "think"
    assert "".join(delta.content or "" for delta in deltas) == choice.message.content
    calls = [one for delta in deltas for one in delta.tool_calls or ()]
    assert calls[0].id.startswith("call_") and calls[0].function.name == "find" and {one.index for one in calls} == {0}
    assert json.loads("".join(one.function.arguments for one in calls)) == {"q": "ä x", "n": 3}
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "tool_calls"
    assert chunks[-1].usage.completion_tokens == reply.usage.completion_tokens


def test_thinking_is_chosen_by_the_request(server, monkeypatch):
    for options in (
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        with playing(server.llm, monkeypatch, "Hi") as requests:
            reply = server.post("/v1/chat/completions", messages=MESSAGES, **options).json()
        assert reply["choices"][0]["message"] == {"role": "assistant", "content": "Hi", "reasoning_content": None}
        assert server.llm.tokenizer.decode(requests[0].prompt_token_ids).endswith("[assistant]</think>")


def test_stop_strings_end_the_answer_and_not_the_reasoning(server, monkeypatch):
    with playing(server.llm, monkeypatch, "a b", "</think>", "c ", "b d") as requests:
        reply = server.post("/v1/chat/completions", messages=MESSAGES, stop=["b", "x"]).json()
    [choice] = reply["choices"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("a b", "c ")
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "b")
    assert requests[0].sampling.stop == ()


def test_a_final_message_is_continued(server, monkeypatch):
    messages = [*MESSAGES, {"role": "assistant", "content": "That is"}]
    with playing(server.llm, monkeypatch, " it") as requests:
        options = {"continue_final_message": True, "thinking": {"type": "disabled"}}
        reply = server.post("/v1/chat/completions", messages=messages, **options)
    assert reply.json()["choices"][0]["message"]["content"] == " it"
    assert server.llm.tokenizer.decode(requests[0].prompt_token_ids).endswith("[assistant]That is")


def test_several_replies_and_their_logprobs(client):
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=2, seed=3, max_tokens=5, logprobs=True, top_logprobs=3
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    for choice in reply.choices:
        assert len(choice.logprobs.content) <= 5
        for entry in choice.logprobs.content:
            assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
            assert bytes(entry.bytes).decode(errors="replace") == entry.token
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, n=2, seed=3, max_tokens=5, logprobs=True, top_logprobs=3, stream=True
        )
    )
    entries = [[], []]
    for chunk in chunks:
        [choice] = chunk.choices
        entries[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert [[one.token for one in of] for of in entries] == [
        [one.token for one in choice.logprobs.content] for choice in reply.choices
    ]


def test_a_reply_fills_the_context_unless_it_is_limited(server, monkeypatch):
    with playing(server.llm, monkeypatch, "Hi") as requests:
        reply = server.post("/v1/chat/completions", messages=MESSAGES).json()
    limit = server.llm.engine.limits.max_model_len
    assert requests[0].sampling.max_tokens == limit - reply["usage"]["prompt_tokens"]


def test_response_format_constrains_the_answer(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Answer with JSON."}],
        max_tokens=40,
        response_format=wanted,
        extra_body={"thinking": {"type": "disabled"}},
    )
    assert json.loads(reply.choices[0].message.content)["city"] in ("Paris", "Rome")
    assert reply.choices[0].finish_reason == "stop"
