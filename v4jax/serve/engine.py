"""Prompts to tokens, one static batch at a time, over the contiguous state of `nn/state.py`.

Shapes are rounded up to powers of two (rows, prompt chunk, room for tokens), so few programs are compiled. The decode
loop runs one step ahead of the host: while the host turns step i's tokens into text, the device computes step i + 1.
Nothing but the sampled tokens crosses to the host.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax import config
from v4jax.core.check import UserError
from v4jax.models.transformer import Transformer, next_chunk
from v4jax.serve.sampling import Sampled, SamplingParams, batch_options, sample

_LEAST_CHUNK = 16  # shorter prompt chunks are padded to this: another program would cost more than it saves
_LEAST_ROOM = 64


class Request(NamedTuple):
    """Token ids of a prompt, at least one, and how to continue it."""

    prompt: list[int]
    sampling: SamplingParams


class Engine:
    """Runs batches of requests through one model; keeps nothing between them."""

    def __init__(self, model: Transformer, limits: config.Serve):
        graphdef, variables = nnx.split(model)
        # A flat list of arrays, because JAX walks lists natively and nnx's trees in Python, every step.
        self._weights, tree = jax.tree.flatten(variables)
        self._structure = _structure(graphdef, tree)
        self.model, self.limits = model.config, limits

    def check(self, request: Request, name: str) -> None:
        """Raise UserError, calling the prompt `name`, if the request cannot be run."""
        ids, limit = request.prompt, self.limits.max_seq_len
        if not ids:
            raise UserError(f"{name} is empty; a prompt needs at least one token")
        if min(ids) < 0 or max(ids) >= self.model.vocab_size:
            bad = next(i for i in ids if not 0 <= i < self.model.vocab_size)
            raise UserError(f"{name} has token id {bad}; the model's ids are 0 to {self.model.vocab_size - 1}")
        if len(ids) + request.sampling.max_tokens > limit:
            raise UserError(
                f"{name} has {len(ids)} tokens, which with max_tokens {request.sampling.max_tokens} exceeds max_seq_len"
                f" {limit}; shorten one of them or raise max_seq_len (the model takes up to {self.model.max_positions})"
            )

    def run(self, requests: Sequence[Request]) -> Iterator[Sampled]:
        """One token of every row at a time, as numpy arrays; rows beyond the requests are padding.

        At most `limits.max_batch` requests, all of them checked. A row goes on until the largest max_tokens of the
        batch, whatever it says; the caller takes of each row what it wants and closes the iterator, which frees the
        state, when it has enough.
        """
        steps = max(request.sampling.max_tokens for request in requests)
        options, plan = batch_options([request.sampling for request in requests], self._batch(requests))
        state, position, ready = self._start(requests, options, plan)
        for left in reversed(range(steps)):
            ahead = None
            if left:
                state, position, ahead = self._advance(state, ready.token_B, position, options, plan)
            yield _fetch(ready)
            ready = ahead

    def _batch(self, requests: Sequence[Request]) -> int:
        return _bucket(len(requests), 1, self.limits.max_batch)

    @jax.transfer_guard("disallow")
    def _start(self, requests, options, plan):
        """Read the prompts, chunk by chunk: (state, position of each row's first new token, those tokens)."""
        batch, chunk = self._batch(requests), self.limits.prefill_chunk
        lengths_B = np.zeros(batch, np.int32)
        lengths_B[: len(requests)] = [len(request.prompt) for request in requests]
        prompts_BT = np.zeros((batch, lengths_B.max() + max(chunk, _LEAST_CHUNK)), np.int32)
        for row, request in zip(prompts_BT, requests, strict=False):
            row[: len(request.prompt)] = request.prompt
        room = max(len(request.prompt) + request.sampling.max_tokens for request in requests)
        room = _bucket(room, _LEAST_ROOM, self.limits.max_seq_len)
        state, last_BXD = _empty(self._structure, self._weights, batch, room)
        for start in range(0, lengths_B.max(), chunk):
            size = _bucket(lengths_B.max() - start, _LEAST_CHUNK, chunk)
            start_B, count_B = np.minimum(start, lengths_B), np.clip(lengths_B - start, 0, size)
            inputs = jax.device_put((prompts_BT[:, start : start + size], start_B, count_B))
            state, last_BXD = _prefill(self._structure, self._weights, state, last_BXD, *inputs)
        position_B = jax.device_put(lengths_B)
        logits_BV = _head(self._structure, self._weights, last_BXD)
        return state, position_B, _sample(logits_BV, options, position_B, plan)

    @jax.transfer_guard("disallow")
    def _advance(self, state, token_B, position_B, options, plan):
        """One more token of every row: (state, its position, the token)."""
        state, position_B, logits_BV = _decode(self._structure, self._weights, state, token_B, position_B)
        return state, position_B, _sample(logits_BV, options, position_B, plan)


@jax.transfer_guard("disallow")
def _fetch(sampled: Sampled) -> Sampled:
    return jax.device_get(sampled)


def _bucket(size: int, least: int, most: int) -> int:
    """The power of two from `least` on that holds `size`, but not above `most`."""
    return min(max(least, 1 << (int(size) - 1).bit_length()), most)


# --- programs ----------------------------------------------------------------------------------------------------


class _Structure:
    """A model without its arrays, compared by identity: hashing the graph itself would cost a step milliseconds."""

    def __init__(self, graphdef, tree):
        self._graphdef, self._tree = graphdef, tree

    def model(self, weights: list[jax.Array]) -> Transformer:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._tree, weights))


_structure = functools.lru_cache(maxsize=16)(_Structure)  # models of equal structure share their programs


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _empty(structure, weights, batch, tokens):
    """State with room for `tokens`, and streams of each row's last token, which prefill fills."""
    model = structure.model(weights)
    shape = (batch, model.config.mhc.streams, model.config.hidden_size)
    return model.new_state(batch, tokens), jnp.zeros(shape, jnp.dtype(model.config.dtype))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _prefill(structure, weights, state, last_BXD, tokens_BT, start_B, count_B):
    """Read the next `count_B` tokens of every row, which may be none."""
    x_BTXD, state, _ = structure.model(weights).hidden(next_chunk(tokens_BT, start_B, count_B), state)
    end_BXD = x_BTXD[jnp.arange(count_B.shape[0]), jnp.maximum(count_B - 1, 0)]
    return state, jnp.where((count_B > 0)[:, None, None], end_BXD, last_BXD)


@functools.partial(jax.jit, static_argnums=0)
def _head(structure, weights, last_BXD):
    """Float32 logits [B, V] of the streams of each row's last token."""
    return structure.model(weights).logits(last_BXD[:, None])[:, 0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(structure, weights, state, token_B, position_B):
    """Put each row's token at its position: the state, the next position, the logits of what goes there."""
    model = structure.model(weights)
    x_BTXD, state, _ = model.hidden(next_chunk(token_B[:, None], position_B), state)
    return state, position_B + 1, model.logits(x_BTXD)[:, 0]


# Apart from `_decode`, so that a batch with other sampling options does not compile the model again.
_sample = functools.partial(jax.jit, static_argnums=3)(sample)
