"""/v1/completions against `LLM.generate` of the same model."""

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
