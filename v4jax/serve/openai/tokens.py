"""/tokenize and /detokenize, in the form of vLLM."""

from __future__ import annotations

import asyncio

from v4jax.serve.openai import protocol
from v4jax.serve.openai.endpoint import Call
from v4jax.serve.openai.errors import bad_request
from v4jax.serve.openai.replies import chat_options, encode_prompt
from v4jax.serve.sampling_params import is_int


async def tokenize(call: Call) -> None:
    """Return the token ids of `prompt`, or of the prompt of `messages`."""
    service, body = call.service, call.body
    protocol.model_name(body, service.model)
    shows = protocol.flag(body, "return_token_strs")
    tokenizer = service.tokenizer
    if body.get("messages") is not None:
        settings = chat_options(body)
        conversation = service.encoder.from_chat_completions(settings.body)
        ids = await asyncio.to_thread(encode_prompt, service.encoder, conversation, settings)
    else:
        prompt = protocol.field(body, "prompt", lambda value: isinstance(value, str), "text")
        if prompt is None:
            raise bad_request("prompt is missing; send text, or messages", "prompt")
        add = protocol.flag(body, "add_special_tokens", True)
        ids = await asyncio.to_thread(tokenizer.encode_document, prompt, add_special_tokens=add)
    texts = [tokenizer.id_to_token(i) for i in ids] if shows else None
    limit = service.llm.engine.limits.max_model_len
    await call.reply.json({"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts})


async def detokenize(call: Call) -> None:
    """Return the text of `tokens`."""
    service, body = call.service, call.body
    protocol.model_name(body, service.model)
    vocab = service.llm.engine.model.vocab_size

    def good(value: object) -> bool:
        return isinstance(value, list) and all(is_int(i) and 0 <= i < vocab for i in value)

    ids = protocol.field(body, "tokens", good, f"a list of token ids from 0 to {vocab - 1}")
    if ids is None:
        raise bad_request("tokens is missing; send a list of token ids", "tokens")
    text = await asyncio.to_thread(service.tokenizer.decode, ids)
    await call.reply.json({"prompt": text})
