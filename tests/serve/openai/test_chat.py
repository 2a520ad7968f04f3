"""/v1/chat/completions with the client of OpenAI."""

import pytest

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
