"""The batched sampler, which runs on the device."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.serve.sampling_params import SamplingParams

IN_PROMPT = 1 << 30  # bit of a token count, set if the prompt contains the token
_NO_ID = 2**31 - 1  # fills up lists of ids; beyond every vocabulary, so scatters drop it


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

    The other fields are None unless a row needs them; under jit that is static, so a batch without them runs a program
    without them. A row that does not need them gets the same bits either way. penalty_B3: float32 [B, 3], presence,
    frequency and repetition penalty. bias_ids_BN, bias_BN: int32 and float32 [B, N], ids and biases.
    allowed_ids_BN: int32 [B, N], ids that may be sampled; a row without any may sample all. stop_ids_BN: int32 [B, N],
    ids that are not sampled at positions below min_position_B, int32 [B]. Lists are filled up with `_NO_ID`; N is a
    power of two.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    seed_B2: jax.Array
    penalty_B3: jax.Array | None = None
    bias_ids_BN: jax.Array | None = None
    bias_BN: jax.Array | None = None
    allowed_ids_BN: jax.Array | None = None
    stop_ids_BN: jax.Array | None = None
    min_position_B: jax.Array | None = None


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


def make_sampling_tensors(
    rows: Sequence[SamplingParams], prompt_lens: Sequence[int] | None = None
) -> tuple[SamplingTensors, SamplingFlags]:
    """Collect the options of all rows in numpy arrays, and determine the parts of `sample` that they need.

    A row without a seed gets a random one.

    Args:
        rows: sampling options; `min_tokens` holds back their `stop_token_ids`.
        prompt_lens: prompt tokens of each row, which `min_tokens` needs.
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
    options = dataclasses.replace(options, **_logits_options(rows, prompt_lens or [0] * len(rows)))
    draws = [row for row in rows if not row.greedy]
    asked = [row.logprobs for row in rows if row.logprobs is not None]
    most = max(asked) if asked else None
    plan = SamplingFlags(
        needs_noise=bool(draws),
        needs_sort=any(row.top_k > 0 or row.top_p < 1 for row in draws),
        logprobs=None if most is None else round_up_logprobs(most),
    )
    return options, plan


def round_up_logprobs(count: int) -> int:
    """Round a number of log-probabilities up to a power of two, or 0, so that few programs are compiled."""
    return 1 << (count - 1).bit_length() if count else 0


def _logits_options(rows: Sequence[SamplingParams], prompt_lens: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the optional fields of `SamplingTensors` that at least one row needs."""
    options = {}
    if any(row.penalized for row in rows):
        penalties = [(row.presence_penalty, row.frequency_penalty, row.repetition_penalty) for row in rows]
        options["penalty_B3"] = np.array(penalties, np.float32)
    if any(row.logit_bias for row in rows):
        options["bias_ids_BN"] = _padded([[i for i, _ in row.logit_bias] for row in rows], _NO_ID, np.int32)
        options["bias_BN"] = _padded([[bias for _, bias in row.logit_bias] for row in rows], 0, np.float32)
    if any(row.allowed_token_ids for row in rows):
        options["allowed_ids_BN"] = _padded([row.allowed_token_ids or () for row in rows], _NO_ID, np.int32)
    if any(row.min_tokens and row.stop_token_ids for row in rows):
        options["stop_ids_BN"] = _padded([row.stop_token_ids for row in rows], _NO_ID, np.int32)
        first = [length + row.min_tokens for row, length in zip(rows, prompt_lens, strict=True)]
        options["min_position_B"] = np.array(first, np.int32)
    return options


def _padded(lists: Sequence[Sequence[float]], fill: float, dtype: type) -> np.ndarray:
    """Return the lists as rows [B, N], filled up to a power of two."""
    longest = 1 << (max(map(len, lists)) - 1).bit_length()
    return np.array([[*items, *[fill] * (longest - len(items))] for items in lists], dtype)


def token_counts(prompt: Sequence[int], generated: Sequence[int], vocab_size: int) -> np.ndarray:
    """Return how often each id was generated, int32 [V], with the bit `IN_PROMPT` of those in the prompt."""
    count_V = np.bincount(np.asarray(generated, np.int64), minlength=vocab_size).astype(np.int32)
    count_V[np.unique(np.asarray(prompt, np.int64))] += IN_PROMPT
    return count_V


def sample(
    logits_BV: jax.Array,
    options: SamplingTensors,
    position_B: jax.Array,
    plan: SamplingFlags,
    count_BV: jax.Array | None = None,
    mask_BW: jax.Array | None = None,
) -> SamplerOutput:
    """Sample one token for every row, by the Gumbel-max trick.

    Logits are changed in vLLM's order: the mask, allowed ids, `min_tokens`, biases, penalties, temperature, filters.
    Log-probabilities are those of the unchanged logits.

    The noise of a row depends only on its seed and its position. Noise is indexed by token id, not by sorted order, so
    the token of a row does not depend on whether another row needs a sort. Ties go to the lowest token id.

    Args:
        logits_BV: float32 [B, V].
        options: sampling options of the B rows.
        position_B: int32 [B], position of the new token in the sequence of its row.
        plan: the parts to compute; static under jit.
        count_BV: int32 [B, V], `token_counts` of each row; only with penalties.
        mask_BW: int32 [B, ceil(V / 32)], bit i % 32 of word i // 32 is set if id i may be sampled; None allows all.
    """
    finite_B = jnp.isfinite(logits_BV).all(-1)
    model_logits_BV = jnp.where(finite_B[:, None], logits_BV, 0.0)
    logits_BV = _process_logits(model_logits_BV, options, position_B, count_BV, mask_BW)
    token_B = jnp.argmax(logits_BV, -1).astype(jnp.int32)
    if plan.needs_noise:
        noise = jax.vmap(lambda seed, position: _noise(seed, position, logits_BV.shape[1]))
        noise_BV = noise(options.seed_B2, position_B)
        drawn_B = jnp.argmax(_apply_top_k_top_p(logits_BV, options, plan.needs_sort) + noise_BV, -1).astype(jnp.int32)
        token_B = jnp.where(options.temperature_B > 0, drawn_B, token_B)
    if plan.logprobs is None:
        return SamplerOutput(token_B, finite_B)
    return SamplerOutput(token_B, finite_B, *logprobs(model_logits_BV, token_B, plan.logprobs))


def logprobs(logits_BV: jax.Array, token_B: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return log-probabilities of tokens and of the `count` likeliest ones, the last fields of `SamplerOutput`."""
    logp_BV = jax.nn.log_softmax(logits_BV, -1)
    logprob_B1 = jnp.take_along_axis(logp_BV, token_B[:, None], -1)
    rank_B = 1 + (logp_BV > logprob_B1).sum(-1, dtype=jnp.int32)
    top_BK, top_ids_BK = jax.lax.top_k(logp_BV, min(count, logp_BV.shape[1]))
    return logprob_B1[:, 0], rank_B, top_BK, top_ids_BK


def _process_logits(logits_BV: jax.Array, options: SamplingTensors, position_B, count_BV, mask_BW) -> jax.Array:
    """Apply the mask and the optional fields of the options; see `sample`."""
    B, V = logits_BV.shape
    row_B1 = jnp.arange(B)[:, None]
    if mask_BW is not None:
        bits_BWN = (mask_BW[:, :, None] >> jnp.arange(32)) & 1
        logits_BV = _restrict(logits_BV, bits_BWN.reshape(B, -1)[:, :V] > 0)
    if options.allowed_ids_BN is not None:
        listed_BV = jnp.zeros((B, V), bool).at[row_B1, options.allowed_ids_BN].set(True, mode="drop")
        logits_BV = _restrict(logits_BV, listed_BV | (options.allowed_ids_BN[:, :1] == _NO_ID))
    if options.stop_ids_BN is not None:
        stops_BV = jnp.zeros((B, V), bool).at[row_B1, options.stop_ids_BN].set(True, mode="drop")
        logits_BV = _restrict(logits_BV, ~stops_BV | (position_B >= options.min_position_B)[:, None])
    if options.bias_BN is not None:
        logits_BV = logits_BV.at[row_B1, options.bias_ids_BN].add(options.bias_BN, mode="drop")
    if options.penalty_B3 is not None:
        presence_B1, frequency_B1, repetition_B1 = jnp.split(options.penalty_B3, 3, axis=1)
        repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
        logits_BV = jnp.where(count_BV > 0, repeated_BV, logits_BV)
        generated_BV = (count_BV & (IN_PROMPT - 1)).astype(jnp.float32)
        logits_BV = logits_BV - frequency_B1 * generated_BV - presence_B1 * (generated_BV > 0)
    return logits_BV


def _restrict(logits_BV: jax.Array, allowed_BV: jax.Array) -> jax.Array:
    """Set logits of tokens that are not allowed to -inf, except in rows where none would be left."""
    some_B1 = (allowed_BV & (logits_BV > -jnp.inf)).any(-1, keepdims=True)
    return jnp.where(allowed_BV | ~some_B1, logits_BV, -jnp.inf)


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
