"""Parsing of the prompt forms that `LLM` accepts; they are vLLM's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from v4jax.core.errors import UserError
from v4jax.serve.sampling_params import is_int, short_repr

Prompt = str | Sequence[int] | Mapping[str, object]
_FORMS = 'a prompt is a string, a list of token ids, {"prompt": "..."} or {"prompt_token_ids": [...]}'
_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


class Parsed(NamedTuple):
    """One prompt as text, token ids or both. If both are given, the model runs on the ids.

    cache_salt: cached blocks are shared only between prompts of the same salt; None is a salt of its own.
    """

    text: str | None
    ids: list[int] | None
    cache_salt: str | None = None


def parse(prompts: Prompt | Iterable[Prompt]) -> list[Parsed]:
    """Convert one prompt in any form, or any number of prompts, to a list. A flat list of integers is one prompt.

    Raises:
        UserError: a prompt, named by its number, has an unknown form, or its text contains a lone surrogate.
    """
    if isinstance(prompts, (str, Mapping)) or (_is_ids(prompts) and len(prompts)):
        return [_parse_one("prompt 0", prompts)]
    if isinstance(prompts, (bytes, bytearray)) or not isinstance(prompts, Iterable) or _axes(prompts) == 0:
        raise UserError(f"{short_repr(prompts)} is no prompt; {_FORMS}, or a list of these")
    return [_parse_one(f"prompt {i}", prompt) for i, prompt in enumerate(prompts)]


def _parse_one(name: str, prompt: Prompt) -> Parsed:
    if isinstance(prompt, str):
        return Parsed(_text(name, prompt), None)
    if isinstance(prompt, Mapping):
        return _parse_mapping(name, prompt)
    if not _is_ids(prompt):
        raise UserError(f"{name} is {short_repr(prompt)}; {_FORMS}")
    return Parsed(None, [int(i) for i in prompt])


def _parse_mapping(name: str, prompt: Mapping) -> Parsed:
    for key in prompt:
        if key not in _KEYS:
            raise UserError(f"{name} has the key {short_repr(key)}; {_FORMS}")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and ids is None:
        raise UserError(f"{name} is {short_repr(prompt)}; {_FORMS}")
    if text is not None and not isinstance(text, str):
        raise UserError(f'{name} has {short_repr(text)} under "prompt", which must be a string')
    if ids is not None and not _is_ids(ids):
        raise UserError(f'{name} has {short_repr(ids)} under "prompt_token_ids", which must be a list of integers')
    salt = prompt.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise UserError(f'{name} has {short_repr(salt)} under "cache_salt", which must be a string that is not empty')
    return Parsed(None if text is None else _text(name, text), None if ids is None else [int(i) for i in ids], salt)


def _text(name: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is half "
            "a character or a byte that is not UTF-8; decode the text anew, or replace it"
        ) from None
    return text


def _is_ids(value) -> bool:
    """Whether a value is a list of integers or a one-dimensional array of integers."""
    if isinstance(value, (str, bytes, bytearray)) or not (isinstance(value, Sequence) or _axes(value) == 1):
        return False
    items = value if isinstance(value, Sequence) else value.tolist()
    return all(is_int(i) for i in items)


def _axes(value) -> int | None:
    """Number of axes of an array of any library; None if the value is no array."""
    return len(value.shape) if hasattr(value, "shape") and hasattr(value, "tolist") else None
