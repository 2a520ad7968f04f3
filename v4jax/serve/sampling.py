"""Sampling: the options of a request, and the batched sampler that runs on the device."""

from __future__ import annotations

import dataclasses
import numbers
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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


class Logprob(NamedTuple):
    """Log-probability (natural) of a token under the model, before temperature and filters, and its rank from 1."""

    logprob: float
    rank: int


class SamplingFlags(NamedTuple):
    """The parts of `sample` that a batch needs; static, so each combination is a compiled program of its own.

    A row that needs fewer parts than its batch gets the same token as alone.
    """

    needs_noise: bool  # at least one row is not greedy
    needs_sort: bool  # at least one row that is not greedy has top_k or top_p, which need a sort
    logprobs: int | None  # maximum of the rows' `logprobs`, rounded up to a power of two; None: no row has any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingTensors:
    """Sampling options of the rows of a batch.

    temperature_B, top_p_B, min_p_B: float32 [B]; temperature 0 means greedy. top_k_B: int32 [B]. seed_B2: uint32
    [B, 2], the high and low words of the 64-bit seeds.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    seed_B2: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerOutput:
    """One sampled token for every row.

    token_B: int32 [B], the sampled token ids. finite_B: bool [B], False where the logits contained NaN or infinity; the
    token is then meaningless. The other fields are None unless `SamplingFlags.logprobs` is set. logprob_B: float32 [B],
    log-probabilities of the sampled tokens. rank_B: int32 [B], their ranks from 1. top_BK: float32 [B, K],
    log-probabilities of the K likeliest tokens in descending order. top_ids_BK: int32 [B, K], their ids.
    """

    token_B: jax.Array
    finite_B: jax.Array
    logprob_B: jax.Array | None = None
    rank_B: jax.Array | None = None
    top_BK: jax.Array | None = None
    top_ids_BK: jax.Array | None = None


def make_sampling_tensors(rows: Sequence[SamplingParams]) -> tuple[SamplingTensors, SamplingFlags]:
    """Collect the options of all rows in numpy arrays, and determine the parts of `sample` that they need.

    A row without a seed gets a random one.
    """
    column = lambda name, dtype: np.array([getattr(row, name) for row in rows], dtype)
    seeds = [secrets.randbits(64) if row.seed is None else int(row.seed) for row in rows]
    options = SamplingTensors(
        np.array([0 if row.greedy else row.temperature for row in rows], np.float32),
        np.array([min(row.top_k, 2**31 - 1) for row in rows], np.int32),
        column("top_p", np.float32),
        column("min_p", np.float32),
        np.array([divmod(seed, 2**32) for seed in seeds], np.uint32),
    )
    draws = [row for row in rows if not row.greedy]
    asked = [row.logprobs for row in rows if row.logprobs is not None]
    most = max(asked) if asked else None
    plan = SamplingFlags(
        needs_noise=bool(draws),
        needs_sort=any(row.top_k > 0 or row.top_p < 1 for row in draws),
        logprobs=1 << (most - 1).bit_length() if most else most,
    )
    return options, plan


def sample(logits_BV: jax.Array, options: SamplingTensors, position_B: jax.Array, plan: SamplingFlags) -> SamplerOutput:
    """Sample one token for every row, by the Gumbel-max trick.

    The noise of a row depends only on its seed and its position. Noise is indexed by token id, not by sorted order, so
    the token of a row does not depend on whether another row needs a sort. Ties go to the lowest token id.

    Args:
        logits_BV: float32 [B, V].
        options: sampling options of the B rows.
        position_B: int32 [B], position of the new token in the sequence of its row.
        plan: the parts to compute; static under jit.
    """
    finite_B = jnp.isfinite(logits_BV).all(-1)
    logits_BV = jnp.where(finite_B[:, None], logits_BV, 0.0)
    token_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
    if plan.needs_noise:
        noise = jax.vmap(lambda seed, position: _noise(seed, position, logits_BV.shape[1]))
        noise_BV = noise(options.seed_B2, position_B)
        drawn_B = jnp.argmax(_apply_top_k_top_p(logits_BV, options, plan.needs_sort) + noise_BV, -1).astype(jnp.int32)
        token_B = jnp.where(options.temperature_B > 0, drawn_B, token_B)
    if plan.logprobs is None:
        return SamplerOutput(token_B, finite_B)
    logp_BV = jax.nn.log_softmax(logits_BV, -1)
    logprob_B1 = jnp.take_along_axis(logp_BV, token_B[:, None], -1)
    rank_B = 1 + (logp_BV > logprob_B1).sum(-1, dtype=jnp.int32)
    top_BK, top_ids_BK = jax.lax.top_k(logp_BV, min(plan.logprobs, logp_BV.shape[1]))
    return SamplerOutput(token_B, finite_B, logprob_B1[:, 0], rank_B, top_BK, top_ids_BK)


def _noise(seed_2: jax.Array, position: jax.Array, count: int) -> jax.Array:
    """Return Gumbel noise, float32 [count], of one row and position.

    The generator is fixed to threefry2x32, so that JAX's default generator does not change the tokens of a seed.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(seed_2, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (count,), jnp.float32)


def _apply_top_k_top_p(logits_BV: jax.Array, options: SamplingTensors, cut: bool) -> jax.Array:
    """Scale the logits by 1 / temperature and set tokens that min_p, then top_k, then top_p drop to -inf.

    Each row is shifted so that its maximum is 0. top_k and top_p apply only if `cut` is true (some row has them).
    Of tokens with equal logits at the cut of top_k and top_p, those with the lowest ids stay.
    """
    column = lambda a_B: a_B[:, None]
    temperature_B = jnp.where(options.temperature_B > 0, options.temperature_B, 1.0)
    x_BV = (logits_BV - logits_BV.max(-1, keepdims=True)) / column(temperature_B)
    x_BV = jnp.where(x_BV >= column(jnp.log(options.min_p_B)), x_BV, -jnp.inf)
    if not cut:
        return x_BV
    V = x_BV.shape[1]
    sorted_BV = jnp.sort(x_BV, axis=-1, descending=True)
    k_B = jnp.where(options.top_k_B > 0, jnp.minimum(options.top_k_B, V), V)
    in_k_BV = jnp.arange(V) < column(k_B)
    p_BV = jax.nn.softmax(jnp.where(in_k_BV, sorted_BV, -jnp.inf), -1)
    before_BV = jnp.cumsum(p_BV, -1) - p_BV
    # The rounding of the cumulative sum must not drop tokens of a row with top_p 1.
    in_p_BV = (before_BV < column(options.top_p_B)) | (column(options.top_p_B) >= 1)
    # Always keep the likeliest token: a top_p that is 0 in float32 would drop all tokens.
    keep_B1 = column(jnp.maximum((in_k_BV & in_p_BV).sum(-1), 1))
    last_B1 = jnp.take_along_axis(sorted_BV, keep_B1 - 1, -1)
    above_BV, equal_BV = x_BV > last_B1, x_BV == last_B1
    room_B1 = keep_B1 - above_BV.sum(-1, keepdims=True)
    return jnp.where(above_BV | (equal_BV & (jnp.cumsum(equal_BV, -1) <= room_B1)), x_BV, -jnp.inf)


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
