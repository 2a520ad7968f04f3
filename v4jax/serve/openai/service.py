"""What one server serves: an LLM under a name, its chat encoding, and the parts that all routes share."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

from v4jax.core.spinner import spinner
from v4jax.data.chat.encoder import ChatEncoder
from v4jax.data.tokenizer import Tokenizer
from v4jax.serve.llm import LLM
from v4jax.serve.openai import protocol
from v4jax.serve.openai.audit import AuditLog
from v4jax.serve.openai.endpoint import Call
from v4jax.serve.openai.errors import bad_request
from v4jax.serve.openai.frontend import Frontend
from v4jax.serve.openai.keys import read_keys
from v4jax.serve.openai.settings import Settings
from v4jax.serve.sampling_params import SamplingParams


class Service:
    """The parts that the routes of one server share.

    Args:
        llm: the LLM.
        settings: settings of the server.
        encoder: chat encoding of the model; None for a model without a tokenizer.

    Attributes:
        model: name of the model for clients.
        frontend: requests on the engine.
        started: time of the start, seconds since 1970.
        keys: keys of the clients; None lets every client in.
        audit: the audit log; None for none.

    Raises:
        UserError: the file of keys or the audit log is unusable.
    """

    def __init__(self, llm: LLM, settings: Settings, encoder: ChatEncoder | None):
        self.llm, self.settings = llm, settings
        self.model = settings.served_model_name or "v4jax"
        self.frontend = Frontend(llm, settings)
        self.started = int(time.time())
        self.keys = None if settings.api_keys is None else read_keys(settings.api_keys)
        self.audit = None if settings.audit_log is None else AuditLog(settings.audit_log, settings.audit_log_bytes)
        self._encoder = encoder

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ApiError: the model has none.
        """
        if self.llm.tokenizer is None:
            raise bad_request("this model has no tokenizer; send token ids to /v1/completions")
        return self.llm.tokenizer

    @property
    def encoder(self) -> ChatEncoder:
        """The chat encoding.

        Raises:
            ApiError: the model has none.
        """
        if self._encoder is None:
            raise bad_request("this model has no tokenizer, which chat needs; send token ids to /v1/completions")
        return self._encoder

    @property
    def problem(self) -> str | None:
        """Why the server takes no requests, as one line; None if it does."""
        return "the server is shutting down" if self.frontend.draining else self.frontend.monitor.problem

    def admit(self, call: Call, count: int) -> contextlib.AbstractContextManager[None]:
        """Return a context with room for `count` engine requests of a call (`Frontend.admit`).

        Raises:
            ApiError: a budget of the key is used up, or see `Frontend.admit`.
        """
        if call.key is not None:
            call.key.admit()
        return self.frontend.admit(count)

    def cache_salt(self, call: Call) -> str | None:
        """Return the cache salt of a call: cached blocks are shared only between calls of the same salt."""
        salt = protocol.text(call.body, "cache_salt")
        return salt if call.key is None else f"{call.key.name}\0{salt or ''}"

    def warm_up(self) -> None:
        """Compile the programs of the engine, so that the first client does not wait for them."""
        self.llm.generate([[0]], SamplingParams(max_tokens=2, ignore_eos=True))
        if self.llm.tokenizer is not None:
            len(self.llm.tokenizer.pieces)

    async def drain(self, seconds: float) -> bool:
        """Admit no further requests, and wait up to `seconds` for those in flight. Return whether all have ended."""
        self.frontend.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self.frontend.idle.wait()
        except TimeoutError:
            return False
        return True


@contextlib.contextmanager
def load(checkpoint: str, settings: dict[str, Any], options: dict[str, Any]) -> Iterator[Service]:
    """Load a checkpoint, compile its programs and return a service, whose engine is closed at the end of the context.

    Args:
        checkpoint: directory of a run, an orbax checkpoint or Hugging Face weights.
        settings: fields of `Settings`.
        options: arguments of `LLM`.

    Raises:
        UserError: an option is invalid.
    """
    name = os.path.basename(os.path.normpath(checkpoint))
    chosen = Settings(**{"served_model_name": name, **settings})
    with contextlib.ExitStack() as opened:
        with spinner(f"loading {checkpoint}"):
            llm = opened.enter_context(LLM(checkpoint, **options))
        encoder = None if llm.tokenizer is None else ChatEncoder.from_dir(checkpoint, llm.tokenizer)
        service = Service(llm, chosen, encoder)
        with spinner("compiling"):
            service.warm_up()
        yield service
