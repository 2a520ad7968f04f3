"""Synthetic retrieval: needles (a key of two tokens and its value) hidden in random filler, asked for at the end.

A document is

    bos  filler ... k k v ... filler ... k k v ... filler  ask k k v  ask k k v ...

Keys, values and filler are three ranges of ids, and all keys of a document differ. Targets are the questions from the
second token of the key on; the rest cannot be foretold. With values alone as targets no run learnt to tell keys apart;
that the second token is what cures it was not tested by itself. Rows follow from a seed and their number alone, so
nothing is stored, and a run goes on where it was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from v4jax import config
from v4jax.core.errors import UserError
from v4jax.data.packing import empty_row

SOURCE = config.SOURCES[1]  # what config.data.source says for it
KEY, VALUE = 2, 1  # tokens of each
NEEDLE, QUESTION = KEY + VALUE, 1 + KEY  # tokens of a needle, and of "ask" with a key
_TOLD = 2  # tokens of "ask k k v" that nothing foretells: "ask" and the first of the key
_LEAST = 16  # ids below which there is nothing to choose from


@dataclass(frozen=True)
class TokenRanges:
    """Ids of a vocabulary by use: ranges of keys and values, a quarter of it each, and filler, the rest."""

    bos: int
    ask: int
    keys: range
    values: range
    filler: range

    @classmethod
    def of(cls, model: config.Model) -> TokenRanges:
        """Raises UserError for a vocabulary that is too small, or whose first ids are not bos and eos."""
        size = model.vocab_size
        if size < _LEAST or {model.bos_id, model.eos_id} != {0, 1}:
            raise UserError(
                f"data.source={SOURCE} needs a model.vocab_size of at least {_LEAST}, got {size}, with 0 and 1 as "
                f"bos_id and eos_id, got {model.bos_id} and {model.eos_id}"
            )
        quarter = size // 4
        return cls(
            model.bos_id, 2, range(3, 3 + quarter), range(3 + quarter, 3 + 2 * quarter), range(3 + 2 * quarter, size)
        )


@dataclass(frozen=True)
class Haystack:
    """tokens_T int32: bos, filler and N needles; of these the tokens needles_NS, in the order of their places."""

    tokens_T: np.ndarray
    needles_NS: np.ndarray

    def questions(self, ask: int) -> np.ndarray:
        """How each needle is asked for: int32 [N, QUESTION]."""
        return np.pad(self.needles_NS[:, :KEY], ((0, 0), (1, 0)), constant_values=ask)

    def answers(self) -> np.ndarray:
        """What is to follow: int32 [N, VALUE]."""
        return self.needles_NS[:, KEY:]


def haystack(
    rng: np.random.Generator, alphabet: TokenRanges, length: int, needles: int, kinds: int | None = None
) -> Haystack:
    """`length` tokens with one needle somewhere in each of `needles` equal stretches.

    kinds: make the keys of so many different tokens only (None: of all); with few, keys are alike. Raises UserError if
    the needles do not fit or there are not so many keys.
    """
    stretch, kinds = (length - 1) // max(needles, 1), kinds or len(alphabet.keys)
    if stretch < NEEDLE or needles > kinds**KEY:
        raise UserError(
            f"{needles} needles do not fit into {length} tokens with {kinds} key tokens: a needle takes {NEEDLE} "
            f"tokens, and there are {kinds**KEY} keys"
        )
    tokens_T = rng.integers(alphabet.filler.start, alphabet.filler.stop, length, dtype=np.int32)
    tokens_T[0] = alphabet.bos
    start_N = 1 + np.arange(needles) * stretch + rng.integers(0, stretch - NEEDLE + 1, needles)
    key_N = rng.choice(kinds**KEY, needles, replace=False)
    keys_NS = rng.permutation(alphabet.keys)[key_N[:, None] // kinds ** np.arange(KEY) % kinds]
    values_NS = rng.integers(alphabet.values.start, alphabet.values.stop, (needles, VALUE))
    needles_NS = np.concatenate([keys_NS, values_NS], axis=1, dtype=np.int32)
    tokens_T[start_N[:, None] + np.arange(NEEDLE)] = needles_NS
    return Haystack(tokens_T, needles_NS)


class NeedleRows:
    """Endless rows of `seq_len` tokens in the form of `PackedRows`: a haystack, then `questions` with their answers.

    How many needles there are, and of how many different tokens their keys, is drawn anew for each row, evenly on a
    logarithmic scale: few needles are to teach it to look for values at all, before it tells keys apart; few key tokens
    are to teach it to heed the whole key. Positions jump once, by up to what `max_position_embeddings` leaves and at a
    multiple of the compression ratios: needles then lie at every distance that the model is to bridge, though rows are
    short (PoSE, Zhu et al. 2023). seed None: the held-out rows, which are no training rows of any seed.
    """

    def __init__(self, model: config.Model, seq_len: int, questions: int, seed: int | None):
        self.alphabet, self.seq_len, self.questions = TokenRanges.of(model), seq_len, questions
        self.stream = (0, 0) if seed is None else (1, seed)
        self.align, self.eos_id = model.alignment, model.eos_id
        self.jump = model.max_position_embeddings - seq_len
        self.hay = seq_len + 1 - questions * (QUESTION + VALUE)  # the last answer is no input
        self.most = min((self.hay - 1) // (NEEDLE + 1), len(self.alphabet.keys) ** KEY // 2)
        if self.most < 1 or self.jump < 0:
            raise UserError(
                f"data.seq_len {seq_len} must hold {questions} questions and a needle, at least "
                f"{questions * (QUESTION + VALUE) + NEEDLE + 1}, and at most "
                f"model.max_position_embeddings {model.max_position_embeddings}"
            )

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((*self.stream, index))
        needles = _log_uniform(rng, 1, self.most)
        kinds = _log_uniform(rng, int(np.ceil((2 * needles) ** (1 / KEY))), len(self.alphabet.keys))
        hay = haystack(rng, self.alphabet, self.hay, needles, kinds)
        asked = np.resize(rng.permutation(needles), self.questions)
        tail = np.concatenate([hay.questions(self.alphabet.ask), hay.answers()], axis=1)[asked]
        tokens = np.concatenate([hay.tokens_T, tail.reshape(-1)])
        is_answer = np.concatenate([np.zeros(self.hay, bool), np.resize(np.arange(tail.shape[1]) >= _TOLD, tail.size)])
        positions = np.arange(self.seq_len)
        at = self.align * int(rng.integers(self.seq_len // self.align))
        positions[at:] += _log_uniform(rng, 1, self.jump + 1) - 1
        return self.empty_row() | {
            "tokens_T": tokens[:-1],
            "targets_T": np.where(is_answer, tokens, -1)[1:].astype(np.int32),
            "segments_T": np.ones(self.seq_len, np.int32),
            "positions_T": positions.astype(np.int32),
        }

    def empty_row(self) -> dict[str, np.ndarray]:
        """A row of padding."""
        return empty_row(self.seq_len, self.eos_id)


def _log_uniform(rng: np.random.Generator, least: int, most: int) -> int:
    """A number of least..most, each order of magnitude as likely as the next."""
    return min(most, int(np.exp(rng.uniform(np.log(least), np.log(most + 1)))))
