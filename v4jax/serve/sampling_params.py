"""Options of a request: `SamplingParams` and their validation."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from v4jax.core.errors import UserError, suggest

_GREEDY_BELOW = 1e-5  # a lower temperature counts as 0, as in vLLM, because dividing by it would overflow
_MAX_TEMPERATURE = 100.0  # a higher one makes the scaled logits nearly equal, so it is a mistake
_HUGE = float(np.finfo(np.float32).max)  # comparing with it rejects NaN, infinities and integers beyond float32
_MAX_LOGPROBS = 20  # vLLM's default limit


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request; names and meanings are vLLM's.

    The filters apply in the order min_p, top_k, top_p, each to the tokens that the filter before left. The likeliest
    token always stays.

    Args:
        max_tokens: maximum number of tokens to generate.
        temperature: divisor of the logits, from 0 to 100; below 1e-5 decoding is greedy.
        top_k: sample among the k likeliest tokens; 0 and -1 mean all.
        top_p: sample among the smallest set of likeliest tokens whose probabilities sum to at least top_p.
        min_p: drop tokens whose probability is below this fraction of the likeliest token's.
        seed: the same seed gives the same tokens, whatever else is in the batch. None draws a new seed per request.
        stop: a string or strings that end the text; they are cut from it.
        stop_token_ids: an id or ids that end the text, in addition to the ids that end every text of the model.
        ignore_eos: generate on after the ids that end every text of the model.
        logprobs: number of likeliest tokens, up to 20, whose log-probabilities are reported beside the sampled token's;
            0 reports only the sampled token's, None reports none.

    Raises:
        UserError: an option is unknown, or its value is out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None

    def __new__(cls, *args, **options):
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise UserError(f"unknown sampling option {name!r}; {suggest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self):
        self._tuple("stop", str, _is_text, "strings that are not empty")
        self._tuple("stop_token_ids", numbers.Integral, lambda i: is_int(i) and i >= 0, "token ids")
        self._require("max_tokens", is_int(self.max_tokens) and self.max_tokens >= 1, "an integer of at least 1")
        self._require(
            "temperature",
            _is_real(self.temperature) and 0 <= self.temperature <= _MAX_TEMPERATURE,
            f"a number from 0 to {_MAX_TEMPERATURE:g}",
        )
        self._require("top_k", is_int(self.top_k) and self.top_k >= -1, "an integer from 1, or 0 for all tokens")
        self._require("top_p", _is_real(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("min_p", _is_real(self.min_p) and 0 <= self.min_p <= 1, "between 0 and 1")
        self._require(
            "seed",
            self.seed is None or (is_int(self.seed) and 0 <= self.seed < 2**64),
            "an integer from 0 to 2**64 - 1",
        )
        self._require("ignore_eos", isinstance(self.ignore_eos, (bool, np.bool_)), "True or False")
        reported = 0 if self.logprobs is None else self.logprobs
        self._require(
            "logprobs", is_int(reported) and 0 <= reported <= _MAX_LOGPROBS, f"an integer from 0 to {_MAX_LOGPROBS}"
        )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, without random numbers."""
        return self.temperature < _GREEDY_BELOW

    def _tuple(self, name: str, single: type, good: Callable[[Any], object], meaning: str) -> None:
        """Convert a field that holds one value, several or None to a tuple.

        Args:
            name: the field.
            single: type of a single value.
            good: whether a value is valid.
            meaning: description of valid values, for the message.

        Raises:
            UserError: the field is no collection, or one of its values is not valid.
        """
        value = getattr(self, name)
        several = (value,) if isinstance(value, single) else () if value is None else value
        is_list = isinstance(several, (list, tuple, set, frozenset, range)) or getattr(several, "ndim", 0) == 1
        self._require(name, is_list and all(map(good, several)), meaning)
        object.__setattr__(self, name, tuple(several))

    def _require(self, name: str, ok: bool, meaning: str) -> None:
        if not ok:
            raise UserError(f"{name} must be {meaning}, got {short_repr(getattr(self, name))}")


def is_int(value) -> bool:
    """Whether a value is an integer of Python or of another library (`numbers.Integral`); bools are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and -_HUGE < value < _HUGE


def short_repr(value) -> str:
    """Return the first 60 characters of a value's repr, on one line, for messages."""
    try:
        return " ".join(f"{value!r:.60}".split())
    except ValueError:  # Python refuses to format an integer of more than 4,300 digits
        return "an integer of thousands of digits"


def _is_text(value) -> bool:
    """Whether a value is a string that a model can generate: not empty, and encodable as UTF-8 (no lone surrogate)."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= c <= "\udfff" for c in value)
