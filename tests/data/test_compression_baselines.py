import lzma
from collections import Counter

import numpy as np
import pytest

from v4jax.data.compression_baselines import XZ_PRESET, _smooth, _xz_given, baselines, trigram
from v4jax.data.corpus import Corpus, Document, load_corpus


@pytest.fixture(scope="module")
def small():
    """Two small texts of each kind: xz is slow on the whole corpus."""
    texts = {d.name: d for d in load_corpus().train}
    return Corpus([texts["Mark"], texts["Luke"]], [texts["John"]])


def test_all_numbers_are_computed(small):
    result = baselines(small)
    assert 1.5 < result["xz_given_train"] < result["xz_alone"] < 3
    assert result["xz"] == result["xz_given_train"] and result["xz_kind"] == "given the training text"
    assert result["trigram"] == trigram(small.train, small.heldout)
    assert 2 < result["trigram"] < 3


def test_one_pass_xz_is_the_difference_of_two_files(small):
    train, heldout = ("".join(d.text for d in documents).encode() for documents in (small.train, small.heldout))
    sizes = [len(lzma.compress(text, preset=XZ_PRESET)) for text in (train + heldout, train)]
    assert _xz_given(train, heldout) == pytest.approx(8 * (sizes[0] - sizes[1]) / len(heldout), rel=0.01)


def _reference(train, heldout):
    """The same model in loops and sets, Chen and Goodman (1998) section 2.7."""
    grams = [(t[i - 2], t[i - 1], t[i]) for t in (b"\0\0" + d.text.encode() for d in train) for i in range(2, len(t))]
    levels = [Counter(grams), Counter(g[1:] for g in set(grams)), Counter(g[1:] for g in {g[1:] for g in grams})]

    def p(gram):
        if not gram:
            return 1 / 256
        counts, context = levels[3 - len(gram)], gram[:-1]
        seen = [n for g, n in counts.items() if g[:-1] == context]
        n1, n2 = (sum(n == k for n in counts.values()) for k in (1, 2))
        d = n1 / (n1 + 2 * n2) if n1 and n2 else 0.5
        lower = p(gram[1:])
        return (max(counts[gram] - d, 0) + d * len(seen) * lower) / sum(seen) if seen else lower

    texts = [b"\0\0" + d.text.encode() for d in heldout]
    return np.mean([-np.log2(p(tuple(t[i - 2 : i + 1]))) for t in texts for i in range(2, len(t))])


def test_trigram_equals_the_reference():
    train = [Document("", "abracadabra, the cat sat on the mat"), Document("", "é bra")]
    heldout = [Document("", "that bra€"), Document("", "zzz")]
    assert trigram(train, heldout) == pytest.approx(_reference(train, heldout), rel=1e-12)


def test_smoothing_gives_distributions():
    counts = np.random.default_rng(0).poisson(0.3, (50, 256))
    counts[7] = 0
    np.testing.assert_allclose(_smooth(counts, np.full(256, 1 / 256)).sum(-1), 1, rtol=1e-12)
