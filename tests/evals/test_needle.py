"""The needle suite: which questions are asked, how they are judged, and a run of it on a toy."""

import json

import numpy as np
import pytest

from tests.golden import weights
from v4jax import checkpoint, evals
from v4jax.config import Config, Data, Indexer, Serve
from v4jax.core.errors import UserError
from v4jax.data.needle import KEY, QUESTION, VALUE, TokenRanges
from v4jax.evals import needle
from v4jax.evals.thresholds import read

pytestmark = pytest.mark.slow

MODEL = weights.config(
    layer_types=("csa",), kv_qdq=True, indexer=Indexer(index_n_heads=16, index_head_dim=16, index_topk=4)
)
ALPHABET = TokenRanges.of(MODEL)
LIMITS = {"accuracy": 0.9, "lost": 0.01}


class Seeker:
    """An LLM that finds every needle, but those whose first key token is odd."""

    def generate(self, prompts, sampling):
        assert sampling.max_tokens == VALUE and sampling.temperature == 0 and len(prompts) <= needle._REQUESTS
        return [type("Output", (), {"token_ids": self.answer(prompt)}) for prompt in prompts]

    def answer(self, prompt):
        key = prompt[-KEY:]
        at = next(i for i in range(len(prompt)) if prompt[i : i + KEY] == key)
        return [0] * VALUE if key[0] % 2 else prompt[at + KEY : at + KEY + VALUE]


def test_every_needle_is_asked_for_and_counted_at_its_depth():
    stacks = needle.draw(ALPHABET, 640, depths=4, trials=12)
    assert [len(stack.needles_NS) for stack in stacks] == [20, 20, 20]  # 5 a depth: three haystacks for 12
    assert len({stack.tokens_T.tobytes() for stack in stacks}) == 3
    right = needle._ask(Seeker(), stacks[0], ALPHABET.ask)
    np.testing.assert_array_equal(right, stacks[0].needles_NS[:, 0] % 2 == 0)
    assert [len(stack.needles_NS) for stack in needle.draw(ALPHABET, 6400, depths=2, trials=7)] == [14]
    with pytest.raises(UserError, match="--contexts=100 is too short for 4 depths; give at least 128"):
        needle.draw(ALPHABET, 100, depths=4, trials=1)


def test_a_bin_is_judged_by_both_accuracies_and_their_difference():
    rows = lambda *wrong: np.arange(100)[None] >= np.array(wrong)[:, None]
    records = needle.judge({"bf16": rows(0, 10, 11), "fp8": rows(1, 12, 3)}, LIMITS, {"context": 1024})
    found = [(r["depth"], r["metric"], r["precision"], r["value"], r["holds"]) for r in records]
    assert found == [
        (0.5 / 3, "accuracy", "bf16", 1.0, True),
        (0.5 / 3, "accuracy", "fp8", 0.99, True),
        (0.5 / 3, "lost", "fp8", 0.01, True),  # one point is within one point, whatever floats make of it
        (0.5, "accuracy", "bf16", 0.9, True),
        (0.5, "accuracy", "fp8", 0.88, False),
        (0.5, "lost", "fp8", 0.02, False),
        (2.5 / 3, "accuracy", "bf16", 0.89, False),
        (2.5 / 3, "accuracy", "fp8", 0.97, True),
        (2.5 / 3, "lost", "fp8", -0.08, True),
    ]
    assert {r["bound"] for r in records} == {0.9, 0.01} and {r["context"] for r in records} == {1024}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A random model whose config claims that it learned from needles."""
    path = tmp_path_factory.mktemp("needle") / "toy"
    config = Config("toy", MODEL, Data(source="needle", seq_len=64, questions=2), serve=Serve(max_model_len=4096))
    checkpoint.save(weights.build(MODEL, weights.random_flat(MODEL, 3)), path, format="orbax", config=config)
    return str(path)


def test_a_model_that_learned_nothing_is_past_its_bounds(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(needle, "_CHUNK", 64)
    out = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"accuracy 0\S* \(bound 0.95\), .* and \d more"):
        evals.run("needle", toy, json=str(out), contexts=["300"], depths=3, trials=3)
    records = json.loads(out.read_text())
    assert len(records) == 9 and {r["suite"] for r in records} == {"needle"} and {r["trials"] for r in records} == {3}
    table = capsys.readouterr().out
    assert "toy: needles found in 300 tokens, 3 trials a depth" in table and table.count(" NO ") == 3


def test_the_reference_rounds_nothing(toy):
    model, ids = checkpoint.load(toy), weights.tokens(MODEL, (1, 24))
    exact = needle.unrounded(model)
    plain = weights.build(weights.config(layer_types=("csa",), indexer=MODEL.indexer), weights.random_flat(MODEL, 3))
    np.testing.assert_array_equal(exact(ids), plain(ids))
    assert np.abs(exact(ids) - model(ids)).max() > 1e-4


def test_what_cannot_be_asked_is_said(toy, tmp_path):
    other = Config("prose", MODEL, Data(seq_len=64), serve=Serve(max_model_len=4096))
    for options, message in [
        ({"contexts": ["many"]}, "--contexts=many is not a list of numbers"),
        ({"contexts": []}, "is not a list of numbers"),
        ({"contexts": [4096]}, f"--contexts=4096 and a question .* at most {4096 - QUESTION - VALUE}"),
        ({"kv_cache_dtype": "bf16"}, "--kv_cache_dtype=bf16 cannot be held against bf16"),
        ({"kv_cache_dtype": "int8"}, "one of auto, fp8, fp8_fp4"),
        ({"bounds": "accuracy"}, "bound 'accuracy' is not NAME=NUMBER with a name of accuracy, lost"),
    ]:
        with pytest.raises(UserError, match=message):
            needle.run(toy, **options)
    with pytest.raises(UserError, match="prose learnt from 'shakespeare-kjv', not to find needles"):
        needle._check(other, "fp8", 1024)
    assert read("lost=1", LIMITS) == {"accuracy": 0.9, "lost": 1.0}
