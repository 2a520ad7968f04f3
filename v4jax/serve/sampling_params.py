"""Options of a request: `SamplingParams` and their validation."""

from __future__ import annotations

import dataclasses
import json
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from v4jax.core.errors import UserError, suggest

_GREEDY_BELOW = 1e-5  # a lower temperature counts as 0, as in vLLM, because dividing by it would overflow
_MAX_TEMPERATURE = 100.0  # a higher one makes the scaled logits nearly equal, so it is a mistake
_HUGE = float(np.finfo(np.float32).max)  # comparing with it rejects NaN, infinities and integers beyond float32
_MAX_LOGPROBS = 20  # vLLM's default limit
_MAX_BIAS = 100.0  # vLLM clips larger biases
_MAX_CONTINUATIONS = 16384  # of one prompt; vLLM's default limit
STRUCTURES = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True)
class StructuredOutputsParams:
    """Form that a generated text must have; exactly one of the first five. Names and meanings are vLLM's.

    Args:
        json: a JSON schema, as a dict or as text. Stored as text.
        regex: a regular expression that the whole text must match, in the syntax of the Rust crate regex.
        choice: strings of which the text must be one.
        grammar: a context-free grammar in Lark's or in GBNF's syntax.
        json_object: True allows any JSON object.
        disable_any_whitespace: JSON without whitespace between its tokens.
        whitespace_pattern: regular expression of the whitespace between the tokens of JSON.

    Raises:
        UserError: an option is unknown, has the wrong type, or not exactly one form is given.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __new__(cls, *args, **options):
        _check_names(cls, options, "option of structured_outputs")
        return super().__new__(cls)

    def __post_init__(self):
        if isinstance(self.json, Mapping):
            try:
                object.__setattr__(self, "json", json.dumps(self.json, ensure_ascii=False))
            except (TypeError, ValueError, RecursionError) as error:
                raise UserError(f"the schema of structured_outputs is not JSON: {short_repr(str(error))}") from None
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not _is_text(value):
                raise UserError(f"{name} of structured_outputs must be a string that is not empty")
        if self.choice is not None:
            listed = isinstance(self.choice, (list, tuple)) and self.choice
            if not listed or not all(map(_is_text, self.choice)):
                raise UserError("choice of structured_outputs must be a list of strings that are not empty")
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [name for name in STRUCTURES if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise UserError(f"structured_outputs take one of {', '.join(STRUCTURES)}, got {got}")

    @property
    def structure(self) -> str:
        """The field of STRUCTURES that is given."""
        return next(name for name in STRUCTURES if getattr(self, name) not in (None, False))


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
        prompt_logprobs: the same for the tokens of the prompt. The prompt is then computed without the prefix cache.
        n: number of continuations of the prompt, each with a seed of its own (`seed` plus its index). They share the
            prompt's blocks through the prefix cache. More than 1 needs a temperature above 0.
        presence_penalty: subtracted from the logits of tokens that the continuation contains, from -2 to 2.
        frequency_penalty: subtracted from the logits of these tokens as often as they occur, from -2 to 2.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that the prompt or the
            continuation contains; above 0.
        logit_bias: {token id: bias added to its logit}, clipped to -100 to 100. Stored as a tuple of pairs.
        min_tokens: minimum number of tokens; ids that end the text are not sampled before, and stop strings that end
            before do not count.
        allowed_token_ids: ids that may be sampled; None means all.
        bad_words: a string or strings that are not generated.
        priority: requests with lower numbers run first, and of equal ones the earliest.
        structured_outputs: form that the text must have.

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
    prompt_logprobs: int | None = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    min_tokens: int = 0
    allowed_token_ids: Sequence[int] | None = None
    bad_words: str | Sequence[str] | None = None
    priority: int = 0
    structured_outputs: StructuredOutputsParams | None = None

    def __new__(cls, *args, **options):
        _check_names(cls, options, "sampling option")
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
        for name in ("logprobs", "prompt_logprobs"):
            reported = 0 if getattr(self, name) is None else getattr(self, name)
            self._require(
                name, is_int(reported) and 0 <= reported <= _MAX_LOGPROBS, f"an integer from 0 to {_MAX_LOGPROBS}"
            )
        self._check_continuations()
        self._check_logits_options()

    def _check_continuations(self) -> None:
        """Raise UserError for invalid values of n, min_tokens, priority and structured_outputs."""
        self._require("n", is_int(self.n) and 1 <= self.n <= _MAX_CONTINUATIONS, f"from 1 to {_MAX_CONTINUATIONS}")
        if self.n > 1 and self.greedy:
            raise UserError(f"n must be 1 when temperature is 0, because all continuations are equal, got {self.n}")
        self._require(
            "min_tokens",
            is_int(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens,
            f"an integer from 0 to max_tokens ({short_repr(self.max_tokens)})",
        )
        self._require("priority", is_int(self.priority) and -(2**63) <= self.priority < 2**63, "an integer of 64 bits")
        structured = self.structured_outputs
        is_structured = structured is None or isinstance(structured, StructuredOutputsParams)
        self._require("structured_outputs", is_structured, "a StructuredOutputsParams")
        if structured is not None and self.ignore_eos:
            raise UserError("structured_outputs end with the eos token; leave out ignore_eos")

    def _check_logits_options(self) -> None:
        """Raise UserError for invalid penalties, biases, ids and words; convert the collections to tuples."""
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            self._require(name, _is_real(value) and -2 <= value <= 2, "a number from -2 to 2")
        penalty = self.repetition_penalty
        self._require("repetition_penalty", _is_real(penalty) and penalty > 0, "a number above 0")
        if self.allowed_token_ids is not None:
            self._tuple("allowed_token_ids", numbers.Integral, lambda i: is_int(i) and i >= 0, "token ids")
            self._require("allowed_token_ids", self.allowed_token_ids, "at least one token id, or None for all")
        self._tuple("bad_words", str, _is_text, "strings that are not empty")
        bias = self.logit_bias
        pairs = () if bias is None else bias.items() if isinstance(bias, Mapping) else bias
        pairs = list(pairs) if isinstance(pairs, Iterable) else [pairs]
        good = lambda pair: len(pair) == 2 and is_int(pair[0]) and pair[0] >= 0 and _is_real(pair[1])
        self._require(
            "logit_bias",
            not isinstance(bias, str) and all(isinstance(pair, tuple) and good(pair) for pair in pairs),
            "a dict of token ids and numbers",
        )
        clipped = {int(i): min(max(float(bias), -_MAX_BIAS), _MAX_BIAS) for i, bias in pairs}
        object.__setattr__(self, "logit_bias", tuple(sorted(clipped.items())))

    @property
    def penalized(self) -> bool:
        """Whether sampling depends on the tokens that came before."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

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


def _check_names(cls: type, options: Mapping[str, Any], kind: str) -> None:
    """Raise UserError if an option is no field of the dataclass `cls`."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in options:
        if name not in known:
            raise UserError(f"unknown {kind} {name!r}; {suggest(name, known)}")


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
