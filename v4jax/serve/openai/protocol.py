"""Fields of a request that all protocols share: types, sampling options, streaming options, model.

A field that is null counts as absent. Unknown fields are ignored, as in vLLM.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from v4jax.serve.openai.errors import ApiError, bad_request
from v4jax.serve.sampling_params import SamplingParams, StructuredOutputsParams, is_int, short_repr

MAX_LOGPROBS = 20  # log-probabilities of a position, as in OpenAI's API
_MAX_STOPS = 64  # stop strings; every token is compared with all of them
_MAX_STOP_CHARACTERS = 4096  # of one stop string
_MAX_STOP_IDS = 1024
_MAX_LOGIT_BIASES = 4096
# Fields that are options of `SamplingParams` of the same name.
_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "priority",
    "prompt_logprobs",
    "structured_outputs",
)


def field(body: dict, name: str, good: Callable[[Any], bool], meaning: str, default: Any = None) -> Any:
    """Return a field of the body, or `default` if it is absent.

    Args:
        good: whether a value is valid.
        meaning: description of valid values, for the message.

    Raises:
        ApiError: the value is not valid.
    """
    value = body.get(name)
    if value is None:
        return default
    if not good(value):
        raise bad_request(f"{name} must be {meaning}, got {short_repr(value)}", name)
    return value


def flag(body: dict, name: str, default: bool = False) -> bool:
    """Return a field that is true or false."""
    return field(body, name, lambda value: isinstance(value, bool), "true or false", default)


def integer(body: dict, name: str, low: int, high: float = math.inf, default: int | None = None) -> int | None:
    """Return a field that is an integer from `low` to `high`."""
    above = f"from {low}" + ("" if high == math.inf else f" to {high}")
    return field(body, name, lambda value: is_int(value) and low <= value <= high, f"an integer {above}", default)


def number(body: dict, name: str, low: float, high: float) -> float | None:
    """Return a field that is a number from `low` to `high`."""

    def good(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high

    return field(body, name, good, f"a number from {low:g} to {high:g}")


def text(body: dict, name: str) -> str | None:
    """Return a field that is text and not empty."""
    return field(body, name, lambda value: isinstance(value, str) and value != "", "text that is not empty")


def mapping(body: dict, name: str) -> dict:
    """Return a field that is an object; {} if it is absent."""
    return field(body, name, lambda value: isinstance(value, dict), "an object", {})


def model_name(body: dict, served: str) -> str:
    """Return the name of the model; a request without one means the served model, as in vLLM.

    Raises:
        ApiError: another model is asked for (status 404).
    """
    name = body.get("model")
    if name is None:
        return served
    if not isinstance(name, str):
        raise bad_request(f"model must be text, got {short_repr(name)}", "model")
    if name != served:
        raise ApiError(404, f"the model {short_repr(name)} is not served; this server has {served!r}", param="model")
    return served


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """How a reply is streamed.

    Attributes:
        stream: events instead of one body.
        include_usage: the last event has the usage.
        continuous_usage: every event has the usage so far, as in vLLM.
    """

    stream: bool
    include_usage: bool = False
    continuous_usage: bool = False


def stream_options(body: dict) -> StreamOptions:
    """Return the options of `stream` and `stream_options`."""
    stream = flag(body, "stream")
    options = mapping(body, "stream_options")
    if options and not stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    include = flag(options, "include_usage")
    return StreamOptions(stream, include, include and flag(options, "continuous_usage_stats"))


def sampling_options(body: dict) -> dict[str, Any]:
    """Return the fields of the body that are options of `SamplingParams`, without `max_tokens` and log-probabilities.

    Raises:
        ApiError: a field has an invalid value that `SamplingParams` does not check.
    """
    options = {name: body[name] for name in _OPTIONS if body.get(name) is not None}
    if "temperature" in options:
        number(body, "temperature", 0, 2)  # the range of OpenAI; SamplingParams accepts more
    seed = options.get("seed")
    if is_int(seed) and -(2**63) <= seed < 0:
        options["seed"] = seed + 2**64
    _check_stops(options)
    if "logit_bias" in options:
        options["logit_bias"] = _logit_bias(options["logit_bias"])
    if "structured_outputs" in options:
        mapping(body, "structured_outputs")
    return options


def make_sampling(options: dict[str, Any], defaults: dict[str, Any]) -> SamplingParams:
    """Return the SamplingParams of options, over the defaults of the checkpoint.

    Raises:
        UserError: an option has an invalid value.
    """
    if (form := options.get("structured_outputs")) is not None:
        options = options | {"structured_outputs": StructuredOutputsParams(**form)}
    return SamplingParams(**{**defaults, **options})


def continuations(options: dict[str, Any], defaults: dict[str, Any], count: int) -> list[SamplingParams]:
    """Return the SamplingParams of `count` continuations of one prompt. With a seed, each has the next seed.

    Raises:
        UserError: see `make_sampling`.
    """
    first = make_sampling(options, defaults)
    if first.seed is None:
        return [first] * count
    return [dataclasses.replace(first, seed=(first.seed + i) % 2**64) for i in range(count)]


def _check_stops(options: dict[str, Any]) -> None:
    stops = options.get("stop", ())
    stops = [stops] if isinstance(stops, str) else stops
    if isinstance(stops, list) and len(stops) > _MAX_STOPS:
        raise bad_request(f"stop has {len(stops)} strings; {_MAX_STOPS} are the most", "stop")
    if isinstance(stops, list) and any(isinstance(s, str) and len(s) > _MAX_STOP_CHARACTERS for s in stops):
        raise bad_request(f"a stop string has more than {_MAX_STOP_CHARACTERS} characters", "stop")
    ids = options.get("stop_token_ids", ())
    if isinstance(ids, list) and len(ids) > _MAX_STOP_IDS:
        raise bad_request(f"stop_token_ids has {len(ids)} ids; {_MAX_STOP_IDS} are the most", "stop_token_ids")


def _logit_bias(value: Any) -> dict[int, float]:
    """Return {token id: bias} of an object whose names are token ids."""
    good = isinstance(value, dict) and len(value) <= _MAX_LOGIT_BIASES and all(map(_is_bias, value.items()))
    if not good:
        raise bad_request('logit_bias must be an object of biases from -100 to 100, such as {"5": -100}', "logit_bias")
    return {int(name): float(bias) for name, bias in value.items()}


def _is_bias(item: tuple[str, Any]) -> bool:
    name, bias = item
    is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
    return name.isascii() and name.isdecimal() and len(name) < 10 and is_number and -100 <= bias <= 100
