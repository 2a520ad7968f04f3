"""/v1/completions against `LLM.generate` of the same model."""

import asyncio
import json

import pytest

from v4jax.serve import SamplingParams

openai = pytest.importorskip("openai", reason="the client of OpenAI is missing")
pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def events(response):
    """The data of the events of a stream; the last one is "[DONE]"."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def expected(llm, prompt, **options):
    options = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 8} | options
    [output] = llm.generate([prompt], SamplingParams(**options))
    return output


def test_text_and_usage_are_those_of_generate(client, llm):
    out = expected(llm, "To be, or not")
    reply = client.completions.create(model="tiny", prompt="To be, or not", max_tokens=8, **GREEDY)
    [choice] = reply.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, out.text, "length")
    count = len(out.prompt_token_ids)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (count, 8, count + 8)
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-") and reply.model == "tiny"


def test_a_stream_joins_to_the_text_and_ends_with_the_usage(client, llm):
    out = expected(llm, "To be, or not", max_tokens=24)
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt="To be, or not",
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == out.text
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]


def test_prompts_are_texts_ids_or_lists_of_these(server, llm):
    texts, ids = ["To be", "¿Qué?"], [[7, 300, 12], [9]]
    wanted = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    for prompt, several in [(texts, texts), (ids, ids), (ids[0], [ids[0]]), (texts[0], [texts[0]])]:
        reply = server.post("/v1/completions", prompt=prompt, **wanted).json()
        assert [choice["index"] for choice in reply["choices"]] == list(range(len(several)))
        outs = [expected(llm, one, max_tokens=4) for one in several]
        assert [choice["text"] for choice in reply["choices"]] == [out.text for out in outs]
        assert reply["usage"]["prompt_tokens"] == sum(len(out.prompt_token_ids) for out in outs)
    response = server.post("/v1/completions", prompt=texts, stream=True, **wanted)
    pieces = ["", ""]
    for event in events(response):
        [choice] = event["choices"]
        pieces[choice["index"]] += choice["text"]
    assert pieces == [expected(llm, one, max_tokens=4).text for one in texts]


def test_echo_puts_the_prompt_before_the_text(server, llm):
    out = expected(llm, "To be", max_tokens=4)
    wanted = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "echo": True}
    assert server.post("/v1/completions", prompt="To be", **wanted).json()["choices"][0]["text"] == "To be" + out.text
    streamed = events(server.post("/v1/completions", prompt="To be", stream=True, **wanted))
    assert "".join(event["choices"][0]["text"] for event in streamed) == "To be" + out.text
    ids = llm.tokenizer.encode("To be")
    assert server.post("/v1/completions", prompt=ids, **wanted).json()["choices"][0]["text"].startswith("To be")
    only = server.post("/v1/completions", prompt="To be", **(wanted | {"max_tokens": 0})).json()
    assert only["choices"][0]["text"] == "To be" and only["usage"]["completion_tokens"] == 0


def test_a_seed_gives_the_same_continuations(server):
    ask = lambda **more: server.post("/v1/completions", prompt="To be", max_tokens=8, ignore_eos=True, **more).json()
    first = [choice["text"] for choice in ask(seed=5, n=3)["choices"]]
    assert len(set(first)) > 1 and first == [choice["text"] for choice in ask(seed=5, n=3)["choices"]]
    assert first[:1] == [choice["text"] for choice in ask(seed=5)["choices"]]
    assert ask(seed=-1)["choices"] == ask(seed=2**64 - 1)["choices"]


def test_stop_strings_end_the_text(server, llm):
    out = expected(llm, "To be, or not", max_tokens=24)
    stop = out.text[10:13]
    wanted = {"prompt": "To be, or not", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    [choice] = server.post("/v1/completions", stop=[stop, "never"], **wanted).json()["choices"]
    assert choice["text"] == out.text[: out.text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_logprobs_are_those_of_the_engine(server, llm, tokenizer):
    out = expected(llm, "To be, or not", logprobs=2)
    wanted = {"prompt": "To be, or not", "max_tokens": 8, "temperature": 0, "ignore_eos": True, "logprobs": 2}
    [choice] = server.post("/v1/completions", **wanted).json()["choices"]
    found = choice["logprobs"]
    assert found["token_logprobs"] == pytest.approx(
        [at[i].logprob for i, at in zip(out.token_ids, out.logprobs, strict=True)], rel=1e-4
    )
    assert "".join(found["tokens"]) == out.text and found["text_offset"][:2] == [0, len(found["tokens"][0])]
    assert all(1 <= len(top) <= 2 for top in found["top_logprobs"])
    streamed = [
        event["choices"][0]["logprobs"] for event in events(server.post("/v1/completions", stream=True, **wanted))
    ]
    for name in ("tokens", "text_offset"):
        assert [value for one in streamed for value in one[name]] == found[name]
    [as_ids] = server.post("/v1/completions", return_tokens_as_token_ids=True, **wanted).json()["choices"]
    assert as_ids["logprobs"]["tokens"] == [f"token_id:{i}" for i in out.token_ids]


def test_cached_tokens_are_in_the_usage(server):
    prompt = list(range(100, 400))
    ask = lambda: server.post("/v1/completions", prompt=prompt, max_tokens=2, n=2, cache_salt="usage").json()["usage"]
    assert ask()["prompt_tokens_details"]["cached_tokens"] == 0
    usage = ask()
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (300, 256)


def test_options_of_sampling_params_are_fields(server):
    options = {
        "min_tokens": 2,
        "presence_penalty": 1,
        "frequency_penalty": 1,
        "repetition_penalty": 2,
        "logit_bias": {"5": 100},
        "priority": 1,
        "allowed_token_ids": [5, 6],
        "bad_words": ["the"],
    }
    for name, value in options.items():
        response = server.post("/v1/completions", prompt="a", max_tokens=4, **{name: value})
        assert response.status_code == 200, response.text
    wanted = {"prompt": "a", "max_tokens": 3, "ignore_eos": True, "logprobs": 0, "return_tokens_as_token_ids": True}
    for option in ({"logit_bias": {"5": 100}, "temperature": 0}, {"allowed_token_ids": [5]}):
        [choice] = server.post("/v1/completions", **wanted, **option).json()["choices"]
        assert choice["logprobs"]["tokens"] == ["token_id:5"] * 3


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Zoë"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_structured_outputs_constrain_the_text(server):
    pytest.importorskip("llguidance")
    ask = lambda **form: server.post("/v1/completions", prompt="a", max_tokens=60, seed=3, structured_outputs=form)
    [choice] = ask(json=SCHEMA).json()["choices"]
    value = json.loads(choice["text"])
    assert value["name"] in ("Ada", "Zoë") and 0 <= value["age"] <= 99 and choice["finish_reason"] == "stop"
    [choice] = ask(choice=["yes", "no"]).json()["choices"]
    assert choice["text"] in ("yes", "no")
    for form in ({"regex": "("}, {"choice": []}, {"json": SCHEMA, "regex": "a"}, {"jsn": {}}):
        response = ask(**form)
        assert response.status_code == 400, response.text
    assert server.post("/v1/completions", prompt="a", structured_outputs=["yes"]).status_code == 400


def test_echo_reports_the_logprobs_of_the_prompt(server, llm):
    prompt = "To be, or not"
    [choice] = server.post("/v1/completions", prompt=prompt, max_tokens=0, echo=True, logprobs=1).json()["choices"]
    found = choice["logprobs"]["token_logprobs"]
    ids = llm.tokenizer.encode_document(prompt)
    assert len(found) == len(ids) and found[0] is None and all(value < 0 for value in found[1:])
    out = expected(llm, prompt, max_tokens=1, prompt_logprobs=1)
    wanted = [at[i].logprob for i, at in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
    assert found[1:] == pytest.approx(wanted, rel=1e-4)


def test_the_async_client_streams(server, llm):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(model="tiny", prompt="To be", max_tokens=6, stream=True, **GREEDY)
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(run()) == expected(llm, "To be", max_tokens=6).text
