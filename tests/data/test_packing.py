import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4jax.data.packing import PackedRows, _assign_rows

BOS, EOS = 0, 1


def _pack(lengths, seq_len, align):
    """Documents whose tokens are all different, so every one can be traced."""
    stop = np.cumsum(lengths) + 10
    documents = [list(range(end - n, end)) for n, end in zip(lengths, stop, strict=True)]
    return documents, PackedRows(documents, seq_len, align, BOS, EOS)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.sampled_from([(8, 1), (8, 4), (16, 4), (12, 12)]))
def test_every_token_is_a_target_once_and_nothing_mixes(lengths, shape):
    seq_len, align = shape
    documents, rows = _pack(lengths, seq_len, align)
    following = {}  # token -> the two after it in its document
    for document in documents:
        full = [BOS, *document, EOS, -1, -1]
        following |= {t: (full[i + 1], full[i + 2]) for i, t in enumerate(full[:-3]) if i > 0}
    first = {d[0] if d else EOS: [*d, EOS, -1][1] for d in documents}
    targets = []
    for i in range(len(rows)):
        row = rows[i]
        assert all(v.dtype == np.int32 and v.shape == (seq_len,) for v in row.values())
        inside = row["segments_T"] > 0
        assert inside.any() and (row["targets_T"][~inside] == -1).all() and (row["targets2_T"][~inside] == -1).all()
        starts = np.flatnonzero(inside & (row["positions_T"] == 0))
        assert (starts % align == 0).all()
        np.testing.assert_array_equal(row["segments_T"][starts], np.arange(1, len(starts) + 1))
        for t in np.flatnonzero(inside):
            token, target, target2 = (int(row[name][t]) for name in ("tokens_T", "targets_T", "targets2_T"))
            targets.append(target)
            assert (target, target2) == following[token] if token != BOS else target2 == first[target] or target == EOS
            if t not in starts:  # each input is its left neighbor's target, in the same piece
                assert row["segments_T"][t] == row["segments_T"][t - 1]
                assert row["positions_T"][t] == row["positions_T"][t - 1] + 1 and token == row["targets_T"][t - 1]
    assert sorted(targets) == sorted(t for d in documents for t in [*d, EOS])
    assert sorted(rows.targets(range(len(rows)))) == sorted(targets)


def test_the_layout_of_a_small_example():
    rows = PackedRows([[5, 6, 7, 8, 9], [10]], 4, 2, BOS, EOS)
    expected = [
        {"tokens_T": [0, 5, 6, 7], "targets_T": [5, 6, 7, 8], "targets2_T": [6, 7, 8, 9]},
        {"tokens_T": [8, 9, 0, 10], "targets_T": [9, 1, 10, 1], "targets2_T": [1, -1, 1, -1]},
    ]
    expected[0] |= {"segments_T": [1, 1, 1, 1], "positions_T": [0, 1, 2, 3]}
    expected[1] |= {"segments_T": [1, 1, 2, 2], "positions_T": [0, 1, 0, 1]}
    assert [{k: v.tolist() for k, v in rows[i].items()} for i in range(len(rows))] == expected
    assert rows.waste == 0 and rows.targets([1]).tolist() == [9, 1, 10, 1]


def test_best_fit_is_tight_and_keeps_order():
    sizes = np.array([3, 8, 5, 2, 6, 1, 7])
    np.testing.assert_array_equal(_assign_rows(sizes, 8), [0, 1, 0, 2, 2, 3, 3])
    sizes = np.random.default_rng(0).integers(1, 65, 20_000)
    row_of = _assign_rows(sizes, 64)
    fill = np.bincount(row_of, sizes)
    assert fill.max() <= 64 and len(fill) <= 1.01 * sizes.sum() / 64
    assert (np.diff([np.flatnonzero(row_of == r)[0] for r in range(100)]) > 0).all()


def test_a_long_document_reads_on_across_rows():
    (document,), rows = _pack([1000], 64, 16)
    tokens = np.concatenate([rows[i]["tokens_T"] for i in range(len(rows))])
    np.testing.assert_array_equal(tokens[:1001], [BOS, *document])


def test_bad_alignment_and_index():
    with pytest.raises(ValueError, match="not a multiple"):
        PackedRows([[3]], 10, 4, BOS, EOS)
    with pytest.raises(IndexError):
        PackedRows([[3]], 8, 4, BOS, EOS)[1]
