"""Disconnects, overload, slow readers, deadlines, failing and stuck engines, and the end of a server."""

import asyncio
import json
import socket
import threading
import time

import pytest

from tests.serve.openai.conftest import httpx, start
from tests.serve.openai.playback import held, playing

pytestmark = pytest.mark.slow

LONG = {"prompt": [5, 6, 7], "max_tokens": 560, "ignore_eos": True}
SHORT = {"prompt": [5, 6, 7], "max_tokens": 2, "ignore_eos": True}


def counter(server, name):
    """The value of a counter with its labels, such as `requests_cancelled_total{reason="disconnect"}`."""
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith(f"v4jax_{name} "):
            return float(line.rpartition(" ")[2])
    return 0.0


def raw_request(server, body):
    """A socket that has sent a request to /v1/completions."""
    sock = socket.create_connection((server.server.config.host, int(server.url.rpartition(":")[2])))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    sock.sendall(head.encode() + b"\r\n\r\n" + data)
    return sock


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_whose_client_goes_away_is_aborted(server, stream):
    name = 'requests_cancelled_total{reason="disconnect"}'
    before = counter(server, name)
    sock = raw_request(server, {**LONG, "stream": stream})
    wait_for(lambda: server.llm.stats()["num_requests_running"] == 1)
    if stream:
        sock.recv(200)
    sock.close()
    server.wait_until_idle()
    assert counter(server, name) == before + 1
    assert server.post("/v1/completions", **SHORT).status_code == 200


def test_many_clients_that_go_away_leave_nothing_behind(server):
    name = 'requests_cancelled_total{reason="disconnect"}'
    before = counter(server, name)
    socks = [raw_request(server, {**LONG, "stream": i % 2 == 0}) for i in range(30)]
    wait_for(lambda: server.service.frontend.in_flight == 30)
    for sock in socks:
        sock.close()
    server.wait_until_idle()
    assert counter(server, name) == before + 30


def test_a_full_queue_gets_429_at_once(llm, encoder):
    with start(llm, encoder, max_queued_requests=2) as server:
        with held(llm):
            socks = [raw_request(server, SHORT) for _ in range(6)]
            wait_for(lambda: server.service.frontend.in_flight == 6)
            response = server.post("/v1/completions", **SHORT)  # answered while the engine is held
            assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == 429
        answers = [sock.recv(100) for sock in socks]
        assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
        server.wait_until_idle()
        assert server.post("/v1/completions", **SHORT).status_code == 200
        assert counter(server, 'requests_rejected_total{reason="queue_full"}') == 1
        too_many = server.post("/v1/completions", prompt=["a"] * 7, max_tokens=1)
        assert too_many.status_code == 400 and "takes 6 at once" in too_many.json()["error"]["message"]


def test_comments_are_sent_while_nothing_is_generated(llm, encoder):
    with start(llm, encoder, heartbeat_interval=0.05) as server, held(llm):
        sock = raw_request(server, {**SHORT, "stream": True})
        seen = b""
        while seen.count(b": heartbeat\n\n") < 3:
            seen += sock.recv(1000)
        assert b"HTTP/1.1 200" in seen and b"text/event-stream" in seen
        sock.close()


def test_a_request_over_its_deadline_is_aborted(llm, encoder):
    with start(llm, encoder, request_timeout=0.3, heartbeat_interval=0.05) as server:
        with held(llm):
            response = server.post("/v1/completions", **SHORT)
            assert response.status_code == 504 and "0.3 seconds" in response.json()["error"]["message"]
            response = server.post("/v1/completions", stream=True, **SHORT)
            assert response.status_code == 200 and response.text.endswith("\n\n")
            [event] = [line for line in response.text.split("\n") if line.startswith("data: ")]
            assert json.loads(event.removeprefix("data: "))["error"]["code"] == 504
        server.wait_until_idle()


def test_a_failing_step_is_a_500_or_an_event(server, monkeypatch):
    for _ in range(2):
        with playing(server.llm, monkeypatch, "a", error=RuntimeError("secret detail")):
            response = server.post("/v1/completions", **SHORT)
            assert response.status_code == 500 and "secret" not in response.text
    with playing(server.llm, monkeypatch, "a", error=RuntimeError("secret detail")):
        lines = [line for line in server.post("/v1/completions", stream=True, **SHORT).text.split("\n") if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == 500 and "secret" not in str(lines)
    with playing(server.llm, monkeypatch, error=RuntimeError):  # each time another exception
        for _ in range(3):
            server.post("/v1/completions", **SHORT)
    health = server.client.get("/health")
    assert health.status_code == 503 and "RuntimeError" in health.json()["error"]["message"]
    assert server.post("/v1/completions", **SHORT).status_code == 200
    assert server.client.get("/health").status_code == 200


def test_a_stuck_engine_is_reported_and_recovers(llm, encoder):
    with start(llm, encoder, engine_timeout=0.2) as server:
        assert server.client.get("/health").content == b""
        with held(llm):
            sock = raw_request(server, SHORT)
            wait_for(lambda: server.client.get("/health").status_code == 503)
            assert "the engine is stuck" in server.client.get("/health").json()["error"]["message"]
            assert server.client.get("/version").status_code == 200
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        wait_for(lambda: server.client.get("/health").status_code == 200)


def test_a_slow_reader_is_disconnected_and_others_are_not_held_up(llm, encoder, monkeypatch):
    with start(llm, encoder, max_unread_outputs=50, send_timeout=30.0) as server:
        with playing(llm, monkeypatch, *(["x" * 20_000] * 1000)):
            sock = raw_request(server, {**SHORT, "stream": True})
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            name = 'requests_cancelled_total{reason="slow_client"}'
            wait_for(lambda: counter(server, name) == 1)
        assert server.post("/v1/completions", **SHORT).status_code == 200
        sock.close()
        server.wait_until_idle()


def test_a_client_that_reads_nothing_is_disconnected_in_time(llm, encoder, monkeypatch):
    with start(llm, encoder, send_timeout=0.2) as server:
        with playing(llm, monkeypatch, *(["x" * 20_000] * 1000)):
            sock = raw_request(server, {**SHORT, "stream": True})
            wait_for(lambda: counter(server, 'requests_cancelled_total{reason="slow_client"}') == 1)
            sock.close()


def test_long_and_slow_bodies(llm, encoder):
    with start(llm, encoder, max_body_bytes=10_000, body_timeout=0.3) as server:
        for size in (20_000, 1_000_000):
            response = server.post("/v1/completions", prompt="a" * size)
            assert response.status_code == 413 and "10,000 bytes" in response.json()["error"]["message"]
        sock = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        sock.sendall(b"content-length: 100\r\n\r\n{")
        assert sock.recv(100).startswith(b"HTTP/1.1 408")
        sock.close()
        assert server.client.get("/version", headers={"x-long": "a" * 50_000}).status_code in (400, 431)


def test_a_server_that_ends_answers_and_admits_nothing(llm, encoder):
    with start(llm, encoder, drain_timeout=30.0) as server:
        with held(llm):
            sock = raw_request(server, {**SHORT, "stream": True})
            wait_for(lambda: server.service.frontend.in_flight == 1)
            server.server.handle_exit(15, None)
            wait_for(lambda: server.client.get("/ready").status_code == 503)
            response = server.post("/v1/completions", **SHORT)
            assert response.status_code == 503 and "retry-after" in response.headers
            assert "shutting down" in server.client.get("/health").json()["error"]["message"]
        seen = b""
        while b"[DONE]" not in seen:
            seen += sock.recv(10_000)
        sock.close()
        wait_for(lambda: server.server.should_exit)


def test_requests_that_outlast_the_end_get_an_error(llm, encoder):
    with start(llm, encoder, drain_timeout=0.1, heartbeat_interval=0.05) as server:
        with held(llm):
            with httpx.stream("POST", f"{server.url}/v1/completions", json={**SHORT, "stream": True}) as response:
                threading.Timer(0.1, server.server.handle_exit, (15, None)).start()
                lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == 503


def test_replies_do_not_depend_on_what_else_is_asked(server):
    async def ask(client, i):
        body = {"prompt": [5 + i, 6, 7], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        response = await client.post("/v1/completions", json=body, timeout=300)
        return response.json()["choices"][0]["text"]

    async def together():
        async with httpx.AsyncClient(base_url=server.url) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(16)))

    async def alone():
        async with httpx.AsyncClient(base_url=server.url) as client:
            return [await ask(client, i) for i in range(16)]

    assert asyncio.run(together()) == asyncio.run(alone())
