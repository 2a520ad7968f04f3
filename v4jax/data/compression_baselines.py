"""Bits per byte of simple compressors on the held-out text, the baselines that a trained model must beat."""

from __future__ import annotations

import lzma

import numpy as np

from v4jax.data.corpus import Corpus, Document

XZ_PRESET = 9 | lzma.PRESET_EXTREME
XZ_CONTEXT = 16 << 20  # last bytes of the training text that xz gets as context; limits the run time
XZ_FEED = 16 << 10  # bytes per call; small, because Python stops draining the encoder when its input is consumed


def baselines(corpus: Corpus) -> dict[str, float | str]:
    """Compute the bits per byte of `corpus.heldout`.

    Nearly all of the time goes to xz. The keys of the result are:

    xz_alone        xz -9e of the held-out text
    xz_given_train  the bits that the held-out text adds to xz -9e of the training text
    xz, xz_kind     the lower of the two, and its description
    trigram         interpolated Kneser-Ney byte trigram, counted on the training text
    """
    train, heldout = _join(corpus.train), _join(corpus.heldout)
    alone = 8 * len(lzma.compress(heldout, preset=XZ_PRESET)) / len(heldout)
    given = _xz_given(train[-XZ_CONTEXT:], heldout)
    return {
        "xz_alone": alone,
        "xz_given_train": given,
        "xz": min(alone, given),
        "xz_kind": "alone" if alone <= given else "given the training text",
        "trigram": trigram(corpus.train, corpus.heldout),
    }


def trigram(train: list[Document], heldout: list[Document]) -> float:
    """Return the bits per byte of `heldout` under a byte trigram model of `train`.

    The model uses interpolated Kneser-Ney smoothing (Chen and Goodman 1998, section 2.7):

    p(c | ab) = (max(n(abc) - d, 0) + d * t(ab) * p(c | b)) / n(ab)

    t(ab) is the number of distinct bytes seen after ab. d = n1 / (n1 + 2 n2), where n1 and n2 are the numbers of
    trigrams seen once and twice. Lower orders use the same formula, but count distinct contexts instead of occurrences.
    The unigram is interpolated with 1/256. Two zero bytes precede every document.
    """
    a, b, c = _trigrams(train)
    count_abc = np.bincount((a << 16) | (b << 8) | c, minlength=1 << 24).reshape(256, 256, 256)
    count_bc = np.count_nonzero(count_abc, axis=0)
    count_c = np.count_nonzero(count_bc, axis=0)
    p_c = _smooth(count_c, np.full(256, 1 / 256))
    p_bc = _smooth(count_bc, p_c)
    a, b, c = _trigrams(heldout)
    # Compute only the contexts that occur, because the full table of probabilities would take 128 MB.
    contexts, at = np.unique((a << 8) | b, return_inverse=True)
    p_abc = _smooth(count_abc.reshape(-1, 256)[contexts], p_bc[contexts & 255], _discount(count_abc))
    return float(-np.log2(p_abc[at, c]).mean())


def _smooth(counts: np.ndarray, lower: np.ndarray, discount: float | None = None) -> np.ndarray:
    """Apply absolute discounting along the last axis, interpolated with `lower`. Unseen contexts get `lower` itself."""
    discount = _discount(counts) if discount is None else discount
    total = counts.sum(-1, keepdims=True)
    kinds = np.count_nonzero(counts, axis=-1, keepdims=True)
    seen = (np.maximum(counts - discount, 0) + discount * kinds * lower) / np.maximum(total, 1)
    return np.where(total > 0, seen, lower)


def _discount(counts: np.ndarray) -> float:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return once / (once + 2 * twice) if once and twice else 0.5


def _trigrams(documents: list[Document]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return all bytes of all documents (third result) with the two bytes before each: three int32 arrays [N]."""
    text = b"".join(b"\0\0" + d.text.encode() for d in documents)
    lengths = [len(d.text.encode()) + 2 for d in documents]
    stream = np.frombuffer(text, np.uint8).astype(np.int32)
    starts = np.cumsum([0, *lengths[:-1]])
    real = np.ones(len(stream), bool)
    real[starts] = real[starts + 1] = False
    (at,) = np.nonzero(real)
    return stream[at - 2], stream[at - 1], stream[at]


def _xz_given(train: bytes, heldout: bytes) -> float:
    """Return the bits per byte that one LZMA encoder emits for `heldout` after it was fed `train`.

    This is size(train + heldout) - size(train) of two xz files, in one pass instead of two. The encoder holds back
    about 4 KB of its input at the end of each text. The measured bytes therefore have the length of `heldout`, but are
    shifted by about 4 KB.
    """
    encoder = lzma.LZMACompressor(lzma.FORMAT_ALONE, preset=XZ_PRESET)  # the xz container emits in coarse chunks
    size = 0
    for text in (train, heldout):
        before = size
        for at in range(0, len(text), XZ_FEED):
            size += len(encoder.compress(text[at : at + XZ_FEED]))
    return 8 * (size - before) / len(heldout)


def _join(documents: list[Document]) -> bytes:
    return b"".join(d.text.encode() for d in documents)
