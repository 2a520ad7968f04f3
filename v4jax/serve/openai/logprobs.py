"""Log-probabilities of generated tokens in the forms of /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from v4jax.data.tokenizer import Tokenizer
from v4jax.serve.outputs import Logprob

_LOWEST = -9999.0  # JSON has no infinity; the value of OpenAI and vLLM
Position = dict[int, Logprob] | None  # None: the first token of a prompt has no log-probability


@dataclasses.dataclass
class CompletionLogprobs:
    """Builds `logprobs` of /v1/completions, piece by piece.

    Args:
        tokenizer: the tokenizer; None shows ids instead of texts.
        count: number of likeliest tokens of a position.
        as_ids: show "token_id:5" instead of the text of token 5.
    """

    tokenizer: Tokenizer | None
    count: int
    as_ids: bool = False
    _offset: int = 0  # characters so far

    def piece(self, ids: Sequence[int], positions: Sequence[Position]) -> dict:
        """Return the object of the next tokens, whose log-probabilities are `positions`."""
        tokens = [self._text(i) for i in ids]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        chosen = [None if at is None else _finite(at[i].logprob) for i, at in zip(ids, positions, strict=True)]
        return {
            "text_offset": offsets,
            "token_logprobs": chosen,
            "tokens": tokens,
            "top_logprobs": [None if at is None else self._top(i, at) for i, at in zip(ids, positions, strict=True)],
        }

    def _top(self, chosen: int, position: dict[int, Logprob]) -> dict[str, float]:
        """Return {text: log-probability} of the likeliest tokens and of the chosen one."""
        shown = [i for i, found in position.items() if found.rank <= self.count or i == chosen]
        return {self._text(i): _finite(position[i].logprob) for i in shown}

    def _text(self, i: int) -> str:
        return token_text(self.tokenizer, i, self.as_ids)


def chat_logprobs(
    tokenizer: Tokenizer | None, ids: Sequence[int], positions: Sequence[dict[int, Logprob]], count: int
) -> list[dict]:
    """Return `logprobs.content` of chat: for each token its log-probability and those of the `count` likeliest."""
    entries = []
    for i, position in zip(ids, positions, strict=True):
        likeliest = sorted(position.items(), key=lambda item: item[1].rank)
        top = [_entry(tokenizer, j, found) for j, found in likeliest if found.rank <= count]
        entries.append(_entry(tokenizer, i, position[i]) | {"top_logprobs": top})
    return entries


def token_text(tokenizer: Tokenizer | None, i: int, as_id: bool = False) -> str:
    """Return the text of one token; bytes that are no whole character become U+FFFD."""
    if as_id or tokenizer is None:
        return f"token_id:{i}"
    return token_bytes(tokenizer, i).decode("utf-8", errors="replace")


def token_bytes(tokenizer: Tokenizer | None, i: int) -> bytes:
    """Return the bytes of one token; of a special token its name."""
    if tokenizer is None:
        return b""
    piece = tokenizer.pieces[i] if i < len(tokenizer.pieces) else b""
    return piece or (tokenizer.id_to_token(i) or "").encode()


def _entry(tokenizer: Tokenizer | None, i: int, found: Logprob) -> dict:
    return {
        "token": token_text(tokenizer, i),
        "logprob": _finite(found.logprob),
        "bytes": list(token_bytes(tokenizer, i)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
