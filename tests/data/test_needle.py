import dataclasses
import itertools
import json

import numpy as np
import pytest

from v4jax.config import Config, Data, Model, Train
from v4jax.core.errors import UserError
from v4jax.data.needle import KEY, NEEDLE, QUESTION, VALUE, NeedleRows, TokenRanges, haystack
from v4jax.data.pipeline import make_dataset

MODEL = Model(vocab_size=64, layer_types=("swa", "csa", "hca"), compress_rate_hca=16, max_position_embeddings=4096)
ALPHABET = TokenRanges.of(MODEL)


def config(**changes) -> Config:
    data = Data(source="needle", seq_len=96, questions=4)
    return Config(model=MODEL, data=data, train=Train(batch_size=4, **changes))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(a, b):
    for x, y in zip(a, b, strict=True):
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


def test_another_number_of_questions_is_refused():
    iterator = iter(make_dataset(config(), None, seed=0))
    take(iterator, 2)
    state, other = iterator.get_state(), config()
    other = dataclasses.replace(other, data=dataclasses.replace(other.data, questions=3))
    with pytest.raises(UserError, match=r"changed: data.questions 4 -> 3\)"):
        iter(make_dataset(other, None, seed=0)).set_state(state)


def test_a_haystack_has_each_needle_once_in_its_own_stretch():
    hay = haystack(np.random.default_rng(0), ALPHABET, 101, 10)
    assert hay.tokens_T.shape == (101,) and hay.tokens_T[0] == ALPHABET.bos
    (keys,) = np.nonzero(np.isin(hay.tokens_T, ALPHABET.keys))
    starts = keys.reshape(10, KEY)[:, 0]
    assert (np.diff(keys.reshape(10, KEY)) == 1).all() and ((starts - 1) // 10 == np.arange(10)).all()
    np.testing.assert_array_equal(hay.tokens_T[starts[:, None] + np.arange(NEEDLE)], hay.needles_NS)
    assert len({tuple(key) for key in hay.needles_NS[:, :KEY].tolist()}) == 10
    assert np.isin(hay.answers(), ALPHABET.values).all()
    assert (np.isin(hay.tokens_T, ALPHABET.values)).sum() == 10 * VALUE
    assert hay.questions(ALPHABET.ask).tolist() == [[2, *needle[:KEY]] for needle in hay.needles_NS.tolist()]
    assert len(set(starts % 10)) > 1  # somewhere in the stretch


def test_rows_ask_for_what_they_hold_and_score_nothing_else():
    rows = NeedleRows(MODEL, 96, 4, seed=3)
    counts, jumps = set(), []
    for i in range(40):
        row = rows[i]
        tokens, targets = row["tokens_T"].tolist(), row["targets_T"]
        asked = [at for at, token in enumerate(tokens) if token == ALPHABET.ask]
        assert len(asked) == 4 and (targets >= 0).sum() == 4 * (KEY - 1 + VALUE)
        needles = [at for at in range(asked[0]) if tokens[at] in ALPHABET.keys][::KEY]
        known = {tuple(tokens[at : at + KEY]): tokens[at + KEY : at + NEEDLE] for at in needles}
        assert len(known) == len(needles)
        for at in asked:
            asked_for = known[tuple(tokens[at + 1 : at + QUESTION])]
            assert targets[at + 1 : at + KEY + VALUE].tolist() == tokens[at + 2 : at + QUESTION] + asked_for
        if len(needles) >= 4:
            assert len({tuple(tokens[at + 1 : at + QUESTION]) for at in asked}) == 4
        counts.add(len(needles))
        steps = np.diff(row["positions_T"])
        (at,) = np.nonzero(steps != 1)
        assert len(at) <= 1 and (at % 16 == 15).all() and row["positions_T"].max() < 4096
        jumps += [*steps[at]]
    assert counts >= {1, 2, 3} and 10 < max(counts) <= 20
    assert max(jumps) > 1000 and len(jumps) > 20
    same([rows[7]], [NeedleRows(MODEL, 96, 4, seed=3)[7]])
    assert (rows[7]["tokens_T"] != NeedleRows(MODEL, 96, 4, seed=4)[7]["tokens_T"]).any()


def test_batches_resume_and_are_shared_by_processes():
    batches = lambda **options: iter(make_dataset(config(), None, seed=1, **options))
    straight, iterator = take(batches(), 7), batches()
    take(iterator, 4)
    resumed = batches()
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    same(take(resumed, 3), straight[4:])
    halves = [take(batches(process_index=i, process_count=2), 2) for i in (0, 1)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
    same(joined, straight[:2])


def test_held_out_rows_are_others_and_always_the_same():
    heldout = lambda seed, **train: make_dataset(config(**train), None, "heldout", seed=seed)
    data = heldout(1)
    same(list(data), list(heldout(2)))
    assert len(data) == 16 and data.num_bytes == 0
    few = list(heldout(1, eval_rows=5))
    assert len(few) == 2 and (few[1]["segments_BT"][1:] == 0).all() and (few[1]["targets_BT"][1:] == -1).all()
    train = {
        row.tobytes() for batch in take(iter(make_dataset(config(), None, seed=0)), 30) for row in batch["tokens_BT"]
    }
    assert not train & {row.tobytes() for batch in data for row in batch["tokens_BT"]}


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="model.vocab_size of at least 16, got 8"):
        TokenRanges.of(Model(vocab_size=8))
    with pytest.raises(UserError, match="got 1 and 5"):
        TokenRanges.of(Model(vocab_size=64, bos_id=1, eos_id=5))
    with pytest.raises(UserError, match="20 needles do not fit into 50 tokens"):
        haystack(np.random.default_rng(0), ALPHABET, 50, 20)
    with pytest.raises(UserError, match="300 needles do not fit"):
        haystack(np.random.default_rng(0), ALPHABET, 5000, 300)
    for length, questions in ((16, 4), (8192, 4)):
        with pytest.raises(UserError, match=f"data.seq_len {length} must hold {questions} questions"):
            NeedleRows(MODEL, length, questions, seed=0)
