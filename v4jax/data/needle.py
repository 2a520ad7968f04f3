"""Synthetic retrieval task: needles (a key of two tokens and its value) in random filler, with questions at the end.

A document is

    bos  filler ... k k v ... filler ... k k v ... filler  ask k k v  ask k k v ...

Keys, values and filler come from three ranges of ids, and all keys of a document differ. The targets are the second key
token and the value of each question; all other tokens are unpredictable. When only the values were targets, no run
learned to distinguish keys. Whether the second key token as a target is what fixed this was not tested in isolation. A
row is a function of the seed and the row number, so nothing is stored, and a run can resume at any row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from v4jax import config
from v4jax.core.errors import UserError
from v4jax.data.packing import empty_row

SOURCE = config.SOURCES[1]  # value of `config.data.source` that selects this task
KEY, VALUE = 2, 1  # tokens of a key and of a value
NEEDLE, QUESTION = KEY + VALUE, 1 + KEY  # tokens of a needle, and of a question ("ask" and a key)
_TOLD = 2  # unpredictable tokens of "ask k k v", which are no targets: "ask" and the first key token
_LEAST = 16  # smallest vocabulary for which the ranges of ids are large enough


@dataclass(frozen=True)
class TokenRanges:
    """Partition of a vocabulary: keys and values have a quarter of the ids each, filler has the remaining ids."""

    bos: int
    ask: int
    keys: range
    values: range
    filler: range

    @classmethod
    def of(cls, model: config.Model) -> TokenRanges:
        """Partition the vocabulary of a model.

        Raises:
            UserError: the vocabulary is too small, or bos and eos are not the ids 0 and 1.
        """
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
    """A sequence with needles.

    Attributes:
        tokens_T: int32 [T]; bos, filler and N needles.
        needles_NS: int32 [N, NEEDLE]; the tokens of each needle, in the order of their positions.
    """

    tokens_T: np.ndarray
    needles_NS: np.ndarray

    def questions(self, ask: int) -> np.ndarray:
        """Return the question for each needle, the id `ask` and the key, int32 [N, QUESTION]."""
        return np.pad(self.needles_NS[:, :KEY], ((0, 0), (1, 0)), constant_values=ask)

    def answers(self) -> np.ndarray:
        """Return the answer to each question, int32 [N, VALUE]."""
        return self.needles_NS[:, KEY:]


def haystack(
    rng: np.random.Generator, alphabet: TokenRanges, length: int, needles: int, kinds: int | None = None
) -> Haystack:
    """Generate a sequence with one needle at a random position in each of `needles` equal stretches.

    Args:
        rng: random generator.
        alphabet: partition of the vocabulary.
        length: number of tokens, including bos.
        needles: number of needles.
        kinds: number of distinct key tokens; None uses all. With fewer key tokens, keys are more similar.

    Raises:
        UserError: the needles do not fit, or there are fewer keys than needles.
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
    """Endless rows of `seq_len` tokens, with the keys of `PackedRows`: a haystack, then questions with their answers.

    The number of needles and the number of distinct key tokens are drawn for each row, log-uniformly. Rows with few
    needles are meant to teach the model to retrieve values before it must distinguish keys. Rows with few key tokens
    are meant to teach it to use the complete key.

    Positions jump once per row, at a multiple of the model's compression ratios, by at most
    `max_position_embeddings - seq_len`. Short rows therefore contain needles at all distances that the model must
    bridge (PoSE, Zhu et al. 2023).

    Args:
        model: config of the model.
        seq_len: tokens per row.
        questions: questions per row.
        seed: seed of the training rows; None gives the held-out rows, which differ from the training rows of any seed.

    Raises:
        UserError: the vocabulary is too small, or `seq_len` is too short or exceeds `max_position_embeddings`.
    """

    def __init__(self, model: config.Model, seq_len: int, questions: int, seed: int | None):
        self.alphabet, self.seq_len, self.questions = TokenRanges.of(model), seq_len, questions
        self.stream = (0, 0) if seed is None else (1, seed)
        self.align, self.eos_id = model.alignment, model.eos_id
        self.jump = model.max_position_embeddings - seq_len
        self.hay = seq_len + 1 - questions * (QUESTION + VALUE)  # + 1, because the last answer is not an input
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
        """Return a row of padding."""
        return empty_row(self.seq_len, self.eos_id)


def _log_uniform(rng: np.random.Generator, least: int, most: int) -> int:
    """Draw a log-uniform integer from least to most, both inclusive."""
    return min(most, int(np.exp(rng.uniform(np.log(least), np.log(most + 1)))))
