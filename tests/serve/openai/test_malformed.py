"""Bodies that are no requests: 4xx, an error of one line in the shape of the API, and an engine that goes on."""

import collections
import json
import random

import pytest

pytestmark = pytest.mark.slow

OK = {"model": "tiny", "prompt": "a", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
TOOL = {"type": "function", "function": {"name": "f"}}

RAW = {
    "empty": b"",
    "no JSON": b"{",
    "trailing comma": b'{"prompt": "a",}',
    "text": b"hello",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a list": b"[]",
    "null": b"null",
    "a number": b"5",
    "a string": b'"prompt"',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "1e999": b'{"prompt": "a", "temperature": 1e999}',
    "deep lists": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"prompt": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}",
    "a huge integer": b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    "half a character": b'{"prompt": "\\ud800"}',
    "half a character in a stop string": b'{"prompt": "a", "stop": ["\\udfff"]}',
    "a NUL": b'{"prompt": "a"}\0',
}
COMPLETIONS = [
    {"prompt": None},
    {"prompt": 5},
    {"prompt": []},
    {"prompt": {}},
    {"prompt": [1.5]},
    {"prompt": [True]},
    {"prompt": [[]]},
    {"prompt": ["a", 5]},
    {"prompt": [["a"]]},
    {"prompt": [-1]},
    {"prompt": [2048]},
    {"prompt": [10**30]},
    {"prompt": [5] * 1000},
    {"prompt": ["a"] * 1000},
    {"prompt": "a " * 5000},
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": 1e9},
    {"max_tokens": 10**9},
    {"max_tokens": "5"},
    {"max_tokens": True},
    {"temperature": 2.1},
    {"temperature": -1},
    {"temperature": "hot"},
    {"temperature": True},
    {"top_p": 0},
    {"top_p": 1.1},
    {"top_p": [1]},
    {"top_k": -2},
    {"top_k": 1.5},
    {"min_p": 2},
    {"seed": 2**64},
    {"seed": "x"},
    {"n": 0},
    {"n": 10**9},
    {"best_of": 3},
    {"logprobs": 21},
    {"logprobs": True},
    {"stop": ""},
    {"stop": [""]},
    {"stop": 5},
    {"stop": ["x"] * 100_000},
    {"stop": ["x" * 100_000]},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [2048]},
    {"stop_token_ids": "x"},
    {"echo": "yes"},
    {"stream": "yes"},
    {"stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": 5},
    {"suffix": "b"},
    {"ignore_eos": 1.5},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {"5": 1000}},
    {"logit_bias": [5]},
    {"cache_salt": ""},
    {"cache_salt": 5},
    {"model": 5},
]
CHATS = [
    {"messages": None},
    {"messages": []},
    {"messages": "hello"},
    {"messages": [5]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "wizard", "content": "a"}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]},
    {"messages": [{"role": "user", "content": "a " * 5000}]},
    {"max_tokens": 10**9},
    {"max_completion_tokens": 0},
    {"top_logprobs": 5},
    {"logprobs": True, "top_logprobs": 21},
    {"tools": [TOOL, TOOL]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
    {"tools": 5},
    {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    {"reasoning_effort": "much"},
    {"thinking": 5},
    {"response_format": {"type": "xml"}},
    {"response_format": {"type": "json_schema"}},
    {"continue_final_message": True},
    {"chat_template": "{{ 1 }}"},
    {"chat_template_kwargs": 5},
    {"chat_template_kwargs": {"thinking": "yes"}},
    {"chat_template_kwargs": {"tools": 1}},
    {"chat_template_kwargs": {"self": 1}},
    {"stop": ["x"] * 1000},
    {"n": 10**9},
]
OTHERS = [
    ("/v1/responses", {}),
    ("/v1/responses", {"input": 5}),
    ("/v1/responses", {"input": "a", "previous_response_id": "x"}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 0}),
    ("/v1/responses", {"input": "a", "background": True}),
    ("/v1/messages", {}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "a"}]}),
    ("/v1/messages", {"messages": [], "max_tokens": 1}),
    ("/v1/messages", {"messages": 5, "max_tokens": 1}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "x", "content": "a"}]}),
    ("/tokenize", {}),
    ("/tokenize", {"prompt": 5}),
    ("/detokenize", {}),
    ("/detokenize", {"tokens": [2048]}),
    ("/detokenize", {"tokens": "a"}),
]


def check_error(response):
    assert 400 <= response.status_code < 500, response.text[:500]
    error = response.json()["error"]
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 1500


def test_there_are_many_cases():
    assert len(RAW) + len(COMPLETIONS) + len(CHATS) + len(OTHERS) >= 60


def test_malformed_bodies_are_refused_and_the_engine_goes_on(server):
    json_type = {"content-type": "application/json"}
    for name, body in RAW.items():
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/messages"):
            response = server.client.post(path, content=body, headers=json_type)
            assert response.status_code == 400, (name, path)
            check_error(response)
    for change in COMPLETIONS:
        response = server.post("/v1/completions", **(OK | change))
        assert response.status_code == 400, (str(change)[:100], response.text[:200])
        check_error(response)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    for change in CHATS:
        response = server.post("/v1/chat/completions", **(CHAT | change))
        assert response.status_code == 400, (str(change)[:100], response.text[:200])
        check_error(response)
    for path, body in OTHERS:
        response = server.post(path, **body)
        assert response.status_code == 400, (path, body)
        check_error(response)
    assert server.post("/v1/completions", **OK).status_code == 200
    assert server.client.get("/health").status_code == 200
    server.wait_until_idle()


def test_other_content_types_methods_paths_and_models(server):
    body = json.dumps(OK)
    for type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        response = server.client.post("/v1/completions", content=body, headers={"content-type": type})
        assert response.status_code == 400 and "Content-Type: application/json" in response.json()["error"]["message"]
    charset = {"content-type": "Application/JSON; charset=utf-8"}
    assert server.client.post("/v1/completions", content=body, headers=charset).status_code == 200
    response = server.client.get("/v1/chat/completions")
    assert response.status_code == 405 and "POST" in response.json()["error"]["message"]
    assert server.client.get("/v2/nothing").json()["error"]["code"] == 404
    for path, body in (("/v1/completions", OK), ("/v1/chat/completions", CHAT), ("/tokenize", {"prompt": "a"})):
        response = server.post(path, **(body | {"model": "gpt-5"}))
        assert response.status_code == 404 and response.json()["error"]["param"] == "model"
    assert server.client.get("/v1/models/gpt-5").status_code == 404
    response = server.post("/v1/messages", model="gpt-5", max_tokens=1, messages=CHAT["messages"])
    assert response.status_code == 404 and response.json()["error"]["type"] == "not_found_error"


def test_random_bodies_are_answered_or_refused(server):
    """Valid bodies of every path, in which random fields have random values."""
    rng = random.Random(0)
    junk = [None, True, 0, -1, 1, 2.5, 10**20, "", "x", "\x00", "json", [], [1], ["a"], [None], [[]], {}, {"type": "x"}]
    junk += [{"a": [{}]}, [{}], [{"role": "user"}], [{"type": "function"}], {"type": "json_object"}, {"role": "x"}]
    nested = ("role", "content", "tool_calls", "type", "function", "name", "reasoning_content", "parameters", "text")
    document = server.client.get("/openapi.json").json()["paths"]
    seen = collections.Counter()
    for _ in range(600):
        path = rng.choice([path for path, operations in document.items() if "post" in operations])
        schema = document[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        body = {"prompt": "a", "messages": CHAT["messages"], "input": "a", "tokens": [5]}
        body = {name: body[name] for name in schema["required"] if name in body}
        body |= {"max_tokens": 1, "max_completion_tokens": 1, "max_output_tokens": 1}
        properties = sorted(schema["properties"])
        for name in rng.sample(properties, min(rng.randint(1, 3), len(properties))):
            value = rng.choice(junk)
            if rng.random() < 0.4:
                value = [{name: rng.choice(junk) for name in rng.sample(nested, 3)} | {"role": "assistant"}]
            body[name] = value
        body.pop("model", None)
        response = server.post(path, **body)
        assert response.status_code < 500, (path, body, response.text)
        if response.status_code >= 400:
            check_error(response)
        seen[response.status_code] += 1
    assert seen[200] > 50 and seen[400] > 200
    server.wait_until_idle()


def test_unknown_fields_and_nulls_are_ignored(server):
    nulls = dict.fromkeys(("temperature", "stop", "n", "seed", "logit_bias", "stream", "suffix", "user", "logprobs"))
    assert server.post("/v1/completions", **OK, **nulls, unheard_of={"a": 1}).status_code == 200
    assert server.post("/v1/chat/completions", **CHAT, **nulls, tools=None, unheard_of=5).status_code == 200
