"""Servers of the small random model on free ports of this machine."""

import contextlib
import threading
import time

import pytest

from tests.serve import engine_harness
from v4jax.data.chat.encoder import ChatEncoder
from v4jax.data.chat.template import ChatTemplate
from v4jax.serve import LLM

httpx = pytest.importorskip("httpx", reason="httpx, which the tests of the server need, is missing")
pytest.importorskip("uvicorn", reason="uvicorn, which the server needs, is missing")

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
    "{# ｜DSML｜ #}"
)


class Running:
    """A server that runs in a thread.

    Attributes:
        service, server: its parts.
        url: its address.
        client: an HTTP client of it.
    """

    def __init__(self, service, server):
        self.service, self.server, self.url = service, server, server.url
        self.client = httpx.Client(base_url=self.url, timeout=300)

    @property
    def llm(self):
        return self.service.llm

    def post(self, path, **body):
        return self.client.post(path, json=body)

    def wait_until_idle(self, seconds=120.0):
        """Wait until the engine has no request; its current step may be one that compiles."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            stats = self.llm.stats()
            running = stats["num_requests_running"] + stats["num_requests_waiting"] + stats["num_blocks_in_use"]
            if not running and not self.service.frontend.in_flight:
                return
            time.sleep(0.02)
        raise AssertionError(f"the engine is still busy after {seconds} seconds: {stats}")


@contextlib.contextmanager
def start(llm, encoder, **settings):
    """Run a server of an LLM inside the context."""
    from v4jax.serve.openai.server import Server
    from v4jax.serve.openai.service import Service
    from v4jax.serve.openai.settings import Settings

    service = Service(llm, Settings(**{"port": 0, "served_model_name": "tiny", **settings}), encoder)
    server = Server(service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    running = Running(service, server)
    try:
        yield running
    finally:
        running.client.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def llm(model, tokenizer):
    limits = {
        name: getattr(engine_harness.LIMITS, name)
        for name in ("max_num_seqs", "max_model_len", "max_num_batched_tokens")
    }
    llm = LLM(model, tokenizer=tokenizer, **limits)
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def encoder(tokenizer):
    return ChatEncoder(tokenizer, template=ChatTemplate(TEMPLATE))


@pytest.fixture(scope="session")
def server(llm, encoder):
    with start(llm, encoder) as running:
        yield running
        running.wait_until_idle()
