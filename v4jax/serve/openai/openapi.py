"""The OpenAPI document of the server: its paths, and the fields that each reads."""

from __future__ import annotations

import v4jax

_TEXT, _FLAG, _OBJECT = {"type": "string"}, {"type": "boolean"}, {"type": "object"}
_OBJECTS = {"type": "array", "items": _OBJECT}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_COUNT = {"type": "integer", "minimum": 1}


def _number(low: float, high: float) -> dict:
    return {"type": "number", "minimum": low, "maximum": high}


def _any(*schemas: dict) -> dict:
    return {"anyOf": list(schemas)}


_SAMPLING = {
    "model": _TEXT,
    "temperature": _number(0, 2),
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1},
    "min_p": _number(0, 1),
    "seed": {"type": "integer"},
    "stop": _any(_TEXT, {"type": "array", "items": _TEXT, "maxItems": 64}),
    "stop_token_ids": _IDS,
    "ignore_eos": _FLAG,
    "min_tokens": {"type": "integer", "minimum": 0},
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": {"type": "number", "exclusiveMinimum": 0},
    "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)},
    "priority": {"type": "integer"},
    "cache_salt": _TEXT,
    "stream": _FLAG,
}
_USAGE = {"type": "object", "properties": {"include_usage": _FLAG, "continuous_usage_stats": _FLAG}}
_CONVERSATION = {
    "messages": _OBJECTS,
    "tools": _OBJECTS,
    "reasoning_effort": _TEXT,
    "thinking": _OBJECT,
    "continue_final_message": _FLAG,
    "add_generation_prompt": _FLAG,
    "chat_template_kwargs": _OBJECT,
}
# Path of each POST route: (summary, fields, required fields).
_POSTS = {
    "/v1/completions": (
        "Continue texts or token ids",
        {
            **_SAMPLING,
            "prompt": _any(_TEXT, _IDS, {"type": "array", "items": _any(_TEXT, _IDS)}),
            "max_tokens": {"type": "integer", "minimum": 0},
            "n": _COUNT,
            "echo": _FLAG,
            "logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
            "stream_options": _USAGE,
        },
        ("prompt",),
    ),
    "/v1/chat/completions": (
        "Reply to messages",
        {
            **_SAMPLING,
            **_CONVERSATION,
            "tool_choice": _any(_TEXT, _OBJECT),
            "parallel_tool_calls": _FLAG,
            "response_format": _OBJECT,
            "max_tokens": _COUNT,
            "max_completion_tokens": _COUNT,
            "n": _COUNT,
            "logprobs": _FLAG,
            "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
            "stream_options": _USAGE,
        },
        ("messages",),
    ),
    "/v1/responses": (
        "Reply to input items (OpenAI Responses, without state)",
        {
            **_SAMPLING,
            "input": _any(_TEXT, _OBJECTS),
            "instructions": _TEXT,
            "tools": _OBJECTS,
            "tool_choice": _any(_TEXT, _OBJECT),
            "reasoning": _OBJECT,
            "text": _OBJECT,
            "max_output_tokens": _COUNT,
        },
        ("input",),
    ),
    "/v1/messages": (
        "Reply to messages (Anthropic Messages)",
        {
            **_SAMPLING,
            "messages": _OBJECTS,
            "system": _any(_TEXT, _OBJECTS),
            "tools": _OBJECTS,
            "tool_choice": _OBJECT,
            "thinking": _OBJECT,
            "stop_sequences": {"type": "array", "items": _TEXT, "maxItems": 64},
            "max_tokens": _COUNT,
        },
        ("messages", "max_tokens"),
    ),
    "/v1/messages/count_tokens": (
        "Count the tokens of messages (Anthropic Messages)",
        {"model": _TEXT, "messages": _OBJECTS, "system": _any(_TEXT, _OBJECTS), "tools": _OBJECTS},
        ("messages",),
    ),
    "/tokenize": (
        "Token ids of a prompt or of messages",
        {
            **_CONVERSATION,
            "model": _TEXT,
            "prompt": _TEXT,
            "add_special_tokens": _FLAG,
            "return_token_strs": _FLAG,
        },
        (),
    ),
    "/detokenize": ("Text of token ids", {"model": _TEXT, "tokens": _IDS}, ("tokens",)),
}
_GETS = {
    "/v1/models": "The served model",
    "/v1/models/{model}": "The served model by its name",
    "/health": "200 while requests are served, else 503 with the reason",
    "/ready": "200 while requests are admitted, else 503 with the reason",
    "/version": "Version of v4jax",
    "/metrics": "Metrics in the text format of Prometheus",
    "/openapi.json": "This document",
}
_ERRORS = {
    "400": "A field is invalid",
    "401": "The API key is missing or unknown",
    "404": "The model is not served",
    "408": "The body did not arrive in time",
    "413": "The body is too long",
    "429": "The queue is full, or a budget is used up; see Retry-After",
    "503": "The server is shutting down, or its engine is stuck",
}


def document() -> dict:
    """Return the document."""
    paths: dict[str, dict] = {}
    for path, (summary, properties, required) in _POSTS.items():
        schema = {"type": "object", "properties": properties, "required": list(required)}
        content = {"application/json": {"schema": schema}}
        operation = {"summary": summary, "requestBody": {"required": True, "content": content}}
        paths[path] = {"post": operation | {"responses": _responses("The reply, or its events", _ERRORS)}}
    for path, summary in _GETS.items():
        operation = {"summary": summary, "responses": _responses(summary, {"401": _ERRORS["401"]})}
        if "{model}" in path:
            operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": _TEXT}]
            operation["responses"]["404"] = {"description": _ERRORS["404"]}
        if path in ("/health", "/ready"):
            operation["responses"]["503"] = {"description": _ERRORS["503"]}
        paths[path] = {"get": operation}
    key = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "v4jax serve", "version": v4jax.__version__},
        "paths": paths,
        "components": {"securitySchemes": key},
        "security": [{}, {"key": []}],
    }


def _responses(summary: str, errors: dict[str, str]) -> dict:
    return {"200": {"description": summary}} | {status: {"description": text} for status, text in errors.items()}
