import dataclasses
import json
import pathlib

import grain.python as grain
import numpy as np
import pytest

from v4jax.config import Config, Data, Model, Train
from v4jax.core.errors import UserError
from v4jax.data.corpus import load_corpus
from v4jax.data.pipeline import make_dataset
from v4jax.data.tokenizer import Tokenizer, token_bytes

TOKENIZER = Tokenizer()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Twelve scenes of a play as documents, rows of 64 aligned to 16, batches of 4."""
    path = tmp_path_factory.mktemp("text") / "scenes.jsonl"
    scenes = load_corpus().heldout[0].text.split("SCENE")[:12]
    path.write_text("".join(json.dumps({"text": scene[:3000]}) + "\n" for scene in scenes))
    model = Model(vocab_size=2048, layer_types=("csa", "hca"), compress_rate_csa=4, compress_rate_hca=16)
    return Config(model=model, data=Data(source=str(path), seq_len=64), train=Train(batch_size=4, eval_rows=0))


def _take(iterator, n):
    return [next(iterator) for _ in range(n)]


def _same(a, b):
    for x, y in zip(a, b, strict=True):
        for name in ("tokens_BT", "targets_BT", "targets2_BT", "segments_BT", "positions_BT"):
            np.testing.assert_array_equal(x[name], y[name])


def _row_keys(batches):
    return [row.tobytes() for batch in batches for row in batch["tokens_BT"]]


def test_an_epoch_holds_every_row_once_in_a_new_order(config):
    data = make_dataset(config, TOKENIZER, seed=1)
    n = len(data.rows)
    rows = _row_keys(_take(iter(data), -(-2 * n // 4)))
    expected = sorted(data.rows[i]["tokens_T"].tobytes() for i in range(n))
    assert sorted(rows[:n]) == sorted(rows[n : 2 * n]) == expected
    assert rows[:n] != rows[n : 2 * n]
    assert rows[:n] != _row_keys(_take(iter(make_dataset(config, TOKENIZER, seed=2)), n // 4))
    with pytest.raises(TypeError):
        len(data)


def test_resume_is_exact(config):
    straight = _take(iter(make_dataset(config, TOKENIZER, seed=1)), 9)
    iterator = iter(make_dataset(config, TOKENIZER, seed=1))
    _take(iterator, 5)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = iter(make_dataset(config, TOKENIZER, seed=1))
    resumed.set_state(state)
    _same(_take(resumed, 4), straight[5:])


def _with(config, **changes):
    """The config with other fields, named "data.seq_len" and so on with "__" for the dot."""
    for name, value in changes.items():
        part, field = name.split("__")
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{field: value})})
    return config


def _state_after(config, batches, seed=1):
    iterator = iter(make_dataset(config, TOKENIZER, seed=seed))
    _take(iterator, batches)
    return json.loads(json.dumps(iterator.get_state()))


@pytest.mark.parametrize("size", [1, 3, 7])
def test_another_batch_size_goes_on_at_the_next_row(config, size):
    """No row is read twice and none is left out, whatever the sizes."""
    straight = _row_keys(_take(iter(make_dataset(config, TOKENIZER, seed=1)), 20))
    resumed = iter(make_dataset(_with(config, train__batch_size=size), TOKENIZER, seed=1))
    resumed.set_state(_state_after(config, 5))
    assert _row_keys(_take(resumed, 6)) == straight[20 : 20 + 6 * size]
    back = iter(make_dataset(config, TOKENIZER, seed=1))
    back.set_state(json.loads(json.dumps(resumed.get_state())))
    assert _row_keys(_take(back, 2)) == straight[20 + 6 * size :][:8]


@pytest.mark.parametrize(
    "changes, seed, named",
    [
        ({"data__seq_len": 32}, 1, "changed: data.seq_len 64 -> 32"),
        ({}, 2, "changed: train.seed 1 -> 2"),
        ({"data__source": "edited"}, 1, r"changed: data.source\)"),
        (
            {"data__source": "edited", "data__seq_len": 32},
            2,
            "changed: data.source, data.seq_len 64 -> 32, train.seed 1",
        ),
        ({"data__heldout": "edited"}, 1, r"changed: data.source, data.heldout\)"),
    ],
)
def test_other_data_is_refused_or_read_from_its_first_row(config, tmp_path, changes, seed, named):
    text = pathlib.Path(config.data.source).read_text()
    (tmp_path / "edited.jsonl").write_text(text.replace("the", "thy", 1))
    changes = {name: str(tmp_path / "edited.jsonl") if value == "edited" else value for name, value in changes.items()}
    state, other = _state_after(config, 5), _with(config, **changes)
    with pytest.raises(UserError, match=named) as caught:
        iter(make_dataset(other, TOKENIZER, seed=seed)).set_state(state)
    assert "--config.data.on_change=restart" in str(caught.value) and "\n" not in str(caught.value)
    allowed = iter(make_dataset(_with(other, data__on_change="restart"), TOKENIZER, seed=seed))
    allowed.set_state(state)
    _same(_take(allowed, 3), _take(iter(make_dataset(other, TOKENIZER, seed=seed)), 3))
    assert allowed.get_state()["former"] == [{"rows": 20, **state["identity"]}]
    again = iter(make_dataset(other, TOKENIZER, seed=seed))  # the new data is now the run's
    again.set_state(json.loads(json.dumps(allowed.get_state())))
    assert again.get_state() == allowed.get_state()


def test_another_shuffle_of_grain_is_refused(config, monkeypatch):
    """The order of the rows is hashed, because another version of grain may shuffle in another way."""
    state, shuffle = _state_after(config, 5), grain.MapDataset.shuffle
    monkeypatch.setattr(grain.MapDataset, "shuffle", lambda dataset, **_: shuffle(dataset, seed=77))
    with pytest.raises(UserError, match=r"changed: the shuffle of this grain version\)"):
        iter(make_dataset(config, TOKENIZER, seed=1)).set_state(state)


def test_another_tokenizer_is_refused(config, tmp_path):
    TOKENIZER.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][:-500]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"changed: data.tokenizer\)"):
        iter(make_dataset(config, Tokenizer(tmp_path), seed=1)).set_state(_state_after(config, 5))


def test_a_copy_of_the_data_elsewhere_is_the_same_data(config, tmp_path):
    (tmp_path / "copy.jsonl").write_bytes(pathlib.Path(config.data.source).read_bytes())
    moved = iter(make_dataset(_with(config, data__source=str(tmp_path)), TOKENIZER, seed=1))
    moved.set_state(_state_after(config, 5))
    assert moved.get_state()["row"] == 20


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_processes_share_each_batch(config, split):
    alone = _take(iter(make_dataset(config, TOKENIZER, split, seed=1)), 3)
    halves = [make_dataset(config, TOKENIZER, split, seed=1, process_index=i, process_count=2) for i in (0, 1)]
    pairs = zip(*(_take(iter(half), 3) for half in halves), strict=True)
    _same(alone, [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in pairs])


@pytest.mark.parametrize("eval_rows", [0, 5])
def test_heldout_is_one_pass_and_counts_its_bytes(config, eval_rows):
    config = Config(model=config.model, data=config.data, train=Train(batch_size=4, eval_rows=eval_rows))
    data = make_dataset(config, TOKENIZER, "heldout", seed=0)
    batches = list(data)
    _same(batches, list(data))
    rows = eval_rows or len(data.rows)
    assert len(data) == len(batches) == -(-rows // 4)
    segments = np.concatenate([b["segments_BT"] for b in batches])
    targets = np.concatenate([b["targets_BT"] for b in batches])
    assert (segments[:rows] > 0).any(1).all() and (segments[rows:] == 0).all() and (targets[rows:] == -1).all()
    assert data.num_targets == (targets >= 0).sum()
    assert data.num_bytes == token_bytes(TOKENIZER)[targets[targets >= 0]].sum()
    if eval_rows == 0:
        last = json.loads(open(config.data.source, encoding="utf-8").readlines()[-1])["text"]
        assert data.num_bytes == len(last.encode())
        np.testing.assert_array_equal(batches[0]["tokens_BT"][0], data.rows[0]["tokens_T"])


def test_what_does_not_fit_is_said(config):
    def attempt(model=config.model, **kwargs):
        make_dataset(Config(model=model, data=config.data, train=config.train), TOKENIZER, seed=0, **kwargs)

    with pytest.raises(UserError, match="2048 ids but model.vocab_size is 1000"):
        attempt(Model(vocab_size=1000, layer_types=("swa",)))
    with pytest.raises(UserError, match="model.eos_id is 7 but the tokenizer's is 1"):
        attempt(Model(vocab_size=2048, layer_types=("swa",), eos_id=7))
    with pytest.raises(UserError, match="batch_size 4 is not a multiple of the 3 processes"):
        attempt(process_count=3)
    with pytest.raises(ValueError, match="split"):
        attempt(split="test")
