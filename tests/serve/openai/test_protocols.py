"""/v1/responses, /v1/messages, /tokenize, /detokenize and /openapi.json."""

import json

import pytest

from tests.serve.openai.playback import TOOL, TOOL_CALL, playing

openai = pytest.importorskip("openai", reason="the client of OpenAI is missing")
pytestmark = pytest.mark.slow

PIECES = ["th", "ink</th", "ink>Hi", " there\n\n", *TOOL_CALL]
ARGUMENTS = {"q": "ä x", "n": 3}
MESSAGES = [{"role": "user", "content": "a"}]


def named_events(response):
    """(name, data) of the events of a stream."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in response.text.split("\n\n") if block and not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_a_response_has_its_items(server, monkeypatch):
    tools = [{"type": "function", **TOOL}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        with playing(server.llm, monkeypatch, *PIECES):
            response = client.responses.create(model="tiny", input="a", instructions="be brief", tools=tools)
            events = list(client.responses.create(model="tiny", input="a", tools=tools, stream=True))
    assert response.status == "completed" and response.output_text.strip() == "Hi there"
    reasoning, message, call = response.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "think")
    assert (message.type, message.role) == ("message", "assistant")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "find", ARGUMENTS)
    assert response.usage.input_tokens_details.cached_tokens == 2
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type for event in events]
    assert types[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert types[-1] == "response.completed" and types.count("response.output_item.done") == 3
    final = events[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == final.output_text
    arguments = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert json.loads(arguments) == ARGUMENTS


def test_a_response_that_is_cut_is_incomplete(server):
    reply = server.post("/v1/responses", input="a", max_output_tokens=3, ignore_eos=True).json()
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert reply["usage"]["output_tokens"] == 3


def test_a_message_has_its_blocks(server, monkeypatch):
    tool = {"name": "find", "input_schema": TOOL["parameters"]}
    body = {"model": "tiny", "max_tokens": 100, "messages": MESSAGES, "tools": [tool], "system": "be brief"}
    with playing(server.llm, monkeypatch, *PIECES):
        message = server.post("/v1/messages", **body).json()
        events = named_events(server.post("/v1/messages", stream=True, **body))
    thinking, text, call = message["content"]
    assert thinking == {"type": "thinking", "thinking": "think", "signature": ""} and text["text"].strip() == "Hi there"
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "find", ARGUMENTS)
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    assert message["usage"]["cache_read_input_tokens"] == 2
    assert all(name == data["type"] for name, data in events)
    names = [name for name, _ in events]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    assert names.count("content_block_start") == names.count("content_block_stop") == 3
    deltas = [data["delta"] for name, data in events if name == "content_block_delta"]
    join = lambda type, field: "".join(delta[field] for delta in deltas if delta["type"] == type)
    assert (join("thinking_delta", "thinking"), join("text_delta", "text")) == ("think", text["text"])
    assert json.loads(join("input_json_delta", "partial_json")) == ARGUMENTS
    assert dict(events)["message_delta"]["delta"]["stop_reason"] == "tool_use"


def test_stop_sequences_of_a_message(server, monkeypatch):
    body = {"max_tokens": 100, "messages": MESSAGES, "stop_sequences": ["END"], "thinking": {"type": "disabled"}}
    with playing(server.llm, monkeypatch, "Hi E", "ND there"):
        message = server.post("/v1/messages", **body).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
    assert message["content"] == [{"type": "text", "text": "Hi "}]
    cut = server.post("/v1/messages", max_tokens=2, messages=MESSAGES, ignore_eos=True).json()
    assert cut["stop_reason"] == "max_tokens" and cut["usage"]["output_tokens"] == 2


def test_tokens_are_counted_and_converted(server, tokenizer):
    count = server.post("/v1/messages/count_tokens", messages=MESSAGES).json()["input_tokens"]
    tokens = server.post("/tokenize", messages=MESSAGES).json()
    assert tokens["count"] == len(tokens["tokens"]) == count and tokens["max_model_len"] == 576
    plain = server.post("/tokenize", prompt="To be", add_special_tokens=False, return_token_strs=True).json()
    assert plain["tokens"] == tokenizer.encode("To be") and len(plain["token_strs"]) == plain["count"]
    assert server.post("/tokenize", prompt="To be").json()["tokens"] == [tokenizer.bos_id, *plain["tokens"]]
    assert server.post("/detokenize", tokens=plain["tokens"]).json() == {"prompt": "To be"}


def test_the_openapi_document_has_every_path(server):
    document = server.client.get("/openapi.json").json()
    paths = {route.path.replace(":path", "") for route in server.server.config.app.routes}
    assert set(document["paths"]) == paths and document["openapi"].startswith("3.")
    for path, operations in document["paths"].items():
        for method in operations:
            if "{" not in path:
                assert server.client.request(method, path).status_code != 404
