"""Masks of the tokens that requests may sample next, computed on the host from the tokens that they have.

The mask of a step needs the tokens of the step before, so the engine dispatches the sampling of a step with masks only
after it has collected the step before. The device computes the logits meanwhile.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import numpy as np

from v4jax.core.errors import UserError
from v4jax.data.tokenizer import Tokenizer
from v4jax.serve.request import Request


class TokenMask(Protocol):
    """Restricts the tokens of one request."""

    def restrict(self, generated: Sequence[int], mask_W: np.ndarray) -> None:
        """Clear the bits of tokens that may not follow the generated ones.

        Args:
            generated: all token ids generated so far. After a preemption there may be fewer than at the last call.
            mask_W: int32 [ceil(V / 32)]; bit i % 32 of word i // 32 is token id i.

        Raises:
            UserError: the tokens cannot be computed; the request ends with this error.
        """


class TokenMasks:
    """The masks of all requests of one engine.

    Attributes:
        errors: descriptions of errors by request id; these requests have to end.
    """

    def __init__(self):
        self._masks: dict[Hashable, Sequence[TokenMask]] = {}
        self.errors: dict[Hashable, str] = {}

    def add(self, id: Hashable, masks: Sequence[TokenMask]) -> None:
        if masks:
            self._masks[id] = masks

    def remove(self, id: Hashable) -> None:
        self._masks.pop(id, None)
        self.errors.pop(id, None)

    def __contains__(self, id: Hashable) -> bool:
        return id in self._masks

    def fill(self, requests: Mapping[int, Request], rows: int, vocab_size: int) -> np.ndarray | None:
        """Return the masks of a batch, int32 [rows, ceil(V / 32)]; None if none of its requests has any.

        Args:
            requests: requests by row; their tokens must be all that precede the sampled ones.
            rows: number of rows; those without a request may sample all tokens.
            vocab_size: V.
        """
        masked = {row: request for row, request in requests.items() if request.id in self}
        if not masked:
            return None
        words, rest = divmod(vocab_size, 32)
        every_id = [-1] * words + [(1 << rest) - 1] * (rest > 0)
        mask_BW = np.tile(np.array(every_id, np.int32), (rows, 1))
        for row, request in masked.items():
            generated = request.tokens[len(request.prompt) :]
            try:
                for mask in self._masks[request.id]:
                    mask.restrict(generated, mask_BW[row])
            except UserError as error:
                self.errors[request.id] = str(error)
        return mask_BW


class BadWords:
    """Forbids the last token of each forbidden sequence of tokens, as vLLM does, unless no other token is left.

    Args:
        tokenizer: encodes the words, each with and without a space before it.
        words: `SamplingParams.bad_words`.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]):
        self._sequences = []
        for word in words:
            bare, spaced = tokenizer.encode(word.lstrip()), tokenizer.encode(" " + word.lstrip())
            self._sequences += [ids for ids in (bare, spaced) if ids]

    def restrict(self, generated: Sequence[int], mask_W: np.ndarray) -> None:
        """See `TokenMask.restrict`."""
        rest_W = mask_W.copy().view(np.uint32)
        for *before, last in self._sequences:
            if list(generated[len(generated) - len(before) :]) == before and last // 32 < len(rest_W):
                rest_W[last // 32] &= ~np.uint32(1 << last % 32)
        if rest_W.any():
            mask_W[:] = rest_W.view(np.int32)
