"""API keys, budgets, cache salts of keys, the audit log, and web pages of other origins."""

import hashlib
import json
import stat

import pytest

from tests.serve.openai.conftest import start
from v4jax.core.errors import UserError
from v4jax.serve.openai.keys import Budget, read_keys

SECRET_A, SECRET_B = "sk-secret-of-alice", "sk-secret-of-bob"


def item(name, secret, **budgets):
    return {"name": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(), **budgets}


def write(path, *items):
    path.write_text(json.dumps({"keys": items}))
    return str(path)


def bearer(secret):
    return {"authorization": f"Bearer {secret}"}


def body(**more):
    return {"prompt": [5, 6, 7], "max_tokens": 2, "ignore_eos": True, **more}


@pytest.mark.slow
def test_only_known_keys_are_let_in_and_nothing_secret_is_logged(llm, encoder, tmp_path, capfd):
    keys, log = write(tmp_path / "keys.json", item("alice", SECRET_A), item("bob", SECRET_B)), tmp_path / "audit.jsonl"
    with start(llm, encoder, api_keys=keys, audit_log=str(log)) as server:
        for path in ("/health", "/ready", "/version", "/metrics", "/openapi.json"):
            assert server.client.get(path).status_code == 200
        for headers in ({}, bearer("wrong"), {"authorization": SECRET_A}, {"x-api-key": "wrong"}):
            response = server.client.post("/v1/completions", json=body(), headers=headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert server.client.get("/v1/models", headers=headers).status_code == 401
        assert server.client.post("/v1/messages", json={}).json()["error"]["type"] == "authentication_error"
        ids = {"x-request-id": "my-id"}
        response = server.client.post("/v1/completions", json=body(prompt="private"), headers=bearer(SECRET_A) | ids)
        assert response.status_code == 200 and response.headers["x-request-id"] == "my-id"
        by_other_header = {"x-api-key": SECRET_B}
        assert server.client.post("/v1/completions", json=body(), headers=by_other_header).status_code == 200
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    [line] = [line for line in lines if line["id"] == "my-id"]
    assert (line["key"], line["status"], line["path"], line["model"]) == ("alice", 200, "/v1/completions", "tiny")
    assert line["completion_tokens"] == 2 and line["finish_reasons"] == ["length"] and line["client"] == "127.0.0.1"
    assert [line["key"] for line in lines].count("bob") == 1 and [line["status"] for line in lines].count(401) == 9
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    out = capfd.readouterr()
    for text in (log.read_text(), out.out, out.err):
        assert "secret" not in text and "private" not in text


@pytest.mark.slow
def test_keys_never_share_cached_blocks(llm, encoder, tmp_path):
    keys = write(tmp_path / "keys.json", item("alice", SECRET_A), item("bob", SECRET_B))
    prompt = list(range(500, 800))
    with start(llm, encoder, api_keys=keys) as server:

        def cached(secret, **more):
            ask = body(prompt=prompt, **more)
            usage = server.client.post("/v1/completions", json=ask, headers=bearer(secret)).json()["usage"]
            return usage["prompt_tokens_details"]["cached_tokens"]

        assert [cached(SECRET_A), cached(SECRET_A), cached(SECRET_B), cached(SECRET_B)] == [0, 256, 0, 256]
        assert [cached(SECRET_A, cache_salt="x"), cached(SECRET_A, cache_salt="x")] == [0, 256]
    with start(llm, encoder) as server:
        assert server.post("/v1/completions", **body(prompt=prompt)).json()["usage"]["prompt_tokens_details"] == {
            "cached_tokens": 0
        }


@pytest.mark.slow
def test_budgets_end_in_429(llm, encoder, tmp_path):
    few, tokens = {"requests_per_minute": 2}, {"tokens_per_minute": 8}
    keys = write(tmp_path / "keys.json", item("alice", SECRET_A, **few), item("bob", SECRET_B, **tokens))
    with start(llm, encoder, api_keys=keys) as server:
        for secret, what in ((SECRET_A, "requests"), (SECRET_B, "tokens")):
            ask = lambda secret=secret: server.client.post("/v1/completions", json=body(), headers=bearer(secret))
            assert [ask().status_code for _ in range(2)] == [200, 200]
            response = ask()
            assert response.status_code == 429 and f"budget of {what}" in response.json()["error"]["message"]
            assert 0 < int(response.headers["retry-after"]) <= 60


@pytest.mark.slow
def test_web_pages_of_other_origins_are_refused_by_default(server, llm, encoder):
    page = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in server.client.options("/v1/completions", headers=page).headers
    with start(llm, encoder, allowed_origins=("https://page.example",)) as other:
        headers = other.client.options("/v1/completions", headers=page).headers
        assert headers["access-control-allow-origin"] == "https://page.example"
        strange = page | {"origin": "https://other.example"}
        assert other.client.options("/v1/completions", headers=strange).status_code == 400


def test_a_budget_refills(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("v4jax.serve.openai.keys.time.monotonic", lambda: now[0])
    budget = Budget(60)
    assert budget.wait(60) == 0
    budget.use(90)
    assert budget.wait(1) == 31
    now[0] = 31.0
    assert budget.wait(1) == 0
    now[0] = 1e6
    assert budget.wait(61) == 1 and Budget(None).wait(1e9) == 0


@pytest.mark.parametrize(
    "content, words",
    [
        ("secret", "is no JSON"),
        ("[]", "has no list 'keys'"),
        ('{"keys": []}', "has no list 'keys'"),
        ('{"keys": [5]}', r"keys\[0\] is no object"),
        (json.dumps({"keys": [{"name": "a b", "sha256": "0" * 64}]}), "name must be"),
        (json.dumps({"keys": [{"name": "a", "sha256": "secret"}]}), "64 hexadecimal digits"),
        (json.dumps({"keys": [item("a", "x", requests_per_minute=0)]}), "at least 1"),
        (json.dumps({"keys": [item("a", "x", rpm=5)]}), "unknown field 'rpm'"),
        (json.dumps({"keys": [item("a", "x"), item("a", "y")]}), "an earlier key"),
        (json.dumps({"keys": [item("a", "x"), item("b", "x")]}), "an earlier key"),
    ],
)
def test_a_bad_file_of_keys_is_one_line_without_its_content(tmp_path, content, words):
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_keys(str(tmp_path / "keys.json"))
    assert "secret" not in str(caught.value)


def test_a_missing_file_of_keys_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read --api_keys"):
        read_keys(str(tmp_path / "none.json"))
