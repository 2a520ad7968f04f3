"""Reader of untrusted tokenizer.json and tokenizer_config.json files, which checks limits before the library sees them.

The tokenizers library trusts a file. An id of 10^9 allocates a table of that size, a hundred nested sequences are tried
in 2^100 ways, and some contradictions cause a Rust panic, which is not an Exception in Python.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable
from typing import TypeVar

import tokenizers

from v4jax.core import untrusted_json
from v4jax.core.errors import UserError

MAX_ID = (1 << 24) - 1
_MAX_TOKEN = 8192  # characters of one token; published ones have up to 1,024
_MAX_ADDED, _MAX_ADDED_TEXT = 1 << 16, 1 << 20  # number of added tokens, and their total number of characters
_MAX_PARTS = 10_000  # values in normalizer, pre_tokenizer, post_processor and decoder together
_MAX_NESTING = 10  # nesting depth of these four; published ones have up to 7 levels, including nested Sequences
_MAX_PATTERN = 4096  # characters of a regular expression; published ones have up to 700
_MAX_GROWTH = 4096  # factor by which replacements may lengthen a text
_CURE = "take the tokenizer.json that came with the weights"
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")

Result = TypeVar("Result")


def read(path: pathlib.Path) -> tuple[dict, bytes]:
    """Read and check a tokenizer.json.

    Returns:
        The parsed JSON object, and the bytes of the file.

    Raises:
        UserError: the file cannot be read, is not a tokenizer.json, or exceeds a limit.
    """
    try:
        data = untrusted_json.read_bytes(path, untrusted_json.LARGE)
        spec = untrusted_json.parse(data, untrusted_json.LARGE)
    except untrusted_json.JsonError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise UserError(f"{path} is not a tokenizer.json: it has no 'model'")
    complaint = _vocabulary(spec["model"]) or _added(spec.get("added_tokens", [])) or _parts(spec)
    if complaint:
        raise UserError(f"{path} {complaint}; {_CURE}")
    return spec, data


def read_config(path: pathlib.Path) -> dict:
    """Read a tokenizer_config.json, or another JSON file that names special tokens.

    Raises:
        UserError: the file is not a JSON object, or a special token is not text.
    """
    values = untrusted_json.read_object(path)
    for name, token in values.items():
        content = token.get("content") if isinstance(token, dict) else token
        if name in _TOKENS and not (token is None or type(content) is str):
            raise UserError(f"{path} has a {name} that is no text; download or copy it again")
    return values


class Guarded:
    """Wrapper of a library tokenizer that converts every error of its methods, including Rust panics, to UserError."""

    __slots__ = ("_backend", "_what")

    def __init__(self, backend: tokenizers.Tokenizer, what: str):
        object.__setattr__(self, "_backend", backend)
        object.__setattr__(self, "_what", what)

    def copy(self) -> Guarded:
        """Return a copy of the tokenizer with independent settings."""
        return Guarded(_guarded(self._what, tokenizers.Tokenizer.from_str, self.to_str()), self._what)

    def __getattr__(self, name: str):
        value = getattr(self._backend, name)
        return functools.partial(_guarded, self._what, value) if callable(value) else value

    def __setattr__(self, name: str, value) -> None:
        setattr(self._backend, name, value)


def build(spec: dict, data: bytes, path: pathlib.Path) -> Guarded:
    """Build the library's tokenizer without truncation and padding.

    Args:
        spec: parsed JSON that `read` returned.
        data: bytes that `read` returned.
        path: path of the file, for error messages.

    Raises:
        UserError: the library refuses the file, or the tokenizer has no tokens.
    """
    if spec.get("truncation") or spec.get("padding"):  # v4jax uses neither, and their lengths can cause a Rust panic
        data = json.dumps(spec | {"truncation": None, "padding": None}).encode()
    text = data.decode("utf-8-sig")
    backend = _guarded(f"the tokenizers library refuses {path}", tokenizers.Tokenizer.from_str, text)
    if not backend.get_vocab_size(with_added_tokens=True):
        raise UserError(f"{path} has no tokens; {_CURE}")
    return Guarded(backend, f"the tokenizer of {path} failed")


def _guarded(what: str, action: Callable[..., Result], *args, **options) -> Result:
    """Call `action` and convert its errors, including Rust panics, to a UserError that begins with `what`."""
    try:
        return action(*args, **options)
    except MemoryError:
        raise
    except BaseException as error:
        # A Rust panic is a BaseException, so that it is not caught by accident. Its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {str(error)[:200]}; {_CURE}") from error


def _vocabulary(model: dict) -> str:
    """Return the problem with the vocabulary of a tokenizer model, or "" if there is none."""
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # Unigram: a list of [token, score]
        ids, tokens = range(len(vocab)), [item[0] if isinstance(item, list) and item else None for item in vocab]
    elif isinstance(vocab, dict):
        ids, tokens = vocab.values(), vocab
    else:
        return "has no vocabulary"
    if not vocab:
        return "has an empty vocabulary"
    if not all(type(i) is int and 0 <= i <= MAX_ID for i in ids):
        return f"has a token id that is not in 0..{MAX_ID}"
    if not all(type(token) is str and len(token) <= _MAX_TOKEN for token in tokens):
        return f"has a token that is not text of at most {_MAX_TOKEN:,} characters"
    return ""


def _added(tokens) -> str:
    """Return the problem with the added tokens, or "" if there is none."""
    if not isinstance(tokens, list) or len(tokens) > _MAX_ADDED:
        return f"has added_tokens that are no list of at most {_MAX_ADDED:,}"
    size = 0
    for token in tokens:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or "special" not in token:
            return "has an added token without content or the mark 'special'"
        if type(token.get("id")) is not int or not 0 <= token["id"] <= MAX_ID:
            return f"has an added token whose id is not in 0..{MAX_ID}"
        size += len(token["content"])
    return f"has added tokens of {size:,} characters, too many" if size > _MAX_ADDED_TEXT else ""


def _parts(spec: dict) -> str:
    """Return the problem with the normalizer, pre_tokenizer, post_processor or decoder, or "" if there is none."""
    level, count, growth = [], 0, 1
    for name in _PARTS:
        if not isinstance(spec.get(name), dict | None):
            return f"has a {name} that is no object"
        level.append(spec.get(name))
    for _ in range(_MAX_NESTING):
        below = []
        for value in level:
            if isinstance(value, dict):
                growth *= max(1, *(len(value[key]) for key in ("content", "prepend") if type(value.get(key)) is str), 1)
                if type(pattern := value.get("Regex", "")) is not str or len(pattern) > _MAX_PATTERN:
                    return f"has a regular expression of more than {_MAX_PATTERN:,} characters"
                below += value.values()
            elif isinstance(value, list):
                below += value
        count += len(below)
        if count > _MAX_PARTS or growth > _MAX_GROWTH:
            return f"has {', '.join(_PARTS)} of too many values, or such as lengthen a text too much"
        if not below:
            return ""
        level = below
    return f"nests {', '.join(_PARTS)} too deeply"
