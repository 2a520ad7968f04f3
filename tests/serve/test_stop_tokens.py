"""What ends a text, where files agree and where they do not; and what generation_config.json sets."""

import json
import logging

import pytest

from v4jax.checkpoint.generation_config import GenerationConfig, read_generation_config
from v4jax.config import Model
from v4jax.core.errors import UserError
from v4jax.data.tokenizer import Tokenizer
from v4jax.serve.stop_tokens import Ends, find_ends, warn_of_bos

MODEL = Model(layer_types=("swa",))


@pytest.mark.parametrize(
    "model, file, tokenizer, ids, eos, warnings",
    [
        (1, None, 1, {1}, 1, False),
        (1, None, None, {1}, 1, False),
        ((1, 5), None, 1, {1, 5}, 1, False),
        ((1, 5), None, None, {1, 5}, 1, False),
        (None, None, None, set(), None, False),
        (None, None, 1, set(), None, True),  # null: the tokenizer's does not end a text either
        (1, (), 1, set(), None, True),
        (None, (1,), 1, {1}, 1, True),  # a list stands before a null of the config
        (1, (1, 7), 1, {1, 7}, 1, True),
        ((1, 7), (7, 1), 1, {1, 7}, 1, False),
        (1, (7,), None, {7}, 7, True),
        (1, None, 9, {1, 9}, 9, True),
        (1, (7,), 9, {7, 9}, 9, True),
    ],
)
def test_one_rule_settles_what_ends_a_text(caplog, model, file, tokenizer, ids, eos, warnings):
    tokenizer = None if tokenizer is None else Tokenizer(eos_id=tokenizer)
    ends = find_ends(Model(layer_types=("swa",), eos_id=model), GenerationConfig(file), tokenizer)
    assert ends == Ends(frozenset(ids), eos)
    assert len(caplog.records) == warnings and all("\n" not in record.message for record in caplog.records)


def test_a_disagreement_names_what_each_file_says(caplog):
    find_ends(MODEL, GenerationConfig((5, 7)), Tokenizer(eos_id=9))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "generation_config.json names 5, 7, the model's config 1, the tokenizer 9" in record.message
    assert "; generation ends at 5, 7, 9 (" in record.message


def test_what_the_user_names_counts_alone(caplog):
    find = lambda given: find_ends(MODEL, GenerationConfig((5, 7)), Tokenizer(), given)
    assert find(3) == Ends(frozenset({3}), 3) and find([3, 1]) == Ends(frozenset({1, 3}), 1)
    assert find([]) == Ends(frozenset(), None) and not caplog.records
    for wrong in ("</s>", -1, True, 1.0, [None], [[1]]):
        with pytest.raises(UserError, match="eos_id must be a token id or a list of them"):
            find(wrong)


def test_two_ids_of_bos_are_said(caplog):
    warn_of_bos(MODEL, Tokenizer())
    warn_of_bos(MODEL, None)
    assert not caplog.records
    warn_of_bos(MODEL, Tokenizer(bos_id=4))
    assert "the tokenizer names 4, the model's config 0" in caplog.records[0].message


def written(path, values):
    (path / "generation_config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return read_generation_config(path)


def test_null_absent_and_lists_are_three_things(tmp_path):
    assert read_generation_config(tmp_path) == GenerationConfig(None, {})
    assert written(tmp_path, {}).eos_ids is None
    assert written(tmp_path, {"eos_token_id": None}).eos_ids == () == written(tmp_path, {"eos_token_id": []}).eos_ids
    assert written(tmp_path, {"eos_token_id": 3}).eos_ids == (3,)
    assert written(tmp_path, {"eos_token_id": [3, 4]}).eos_ids == (3, 4)


def test_sampling_options_take_our_names(tmp_path):
    values = {
        "temperature": 0.6,
        "top_k": None,
        "top_p": 0.95,
        "min_p": 0.1,
        "max_new_tokens": 9,
        "do_sample": False,
        "repetition_penalty": 1.1,
    }
    sampling = {"temperature": 0.6, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1, "max_tokens": 9}
    assert written(tmp_path, values).sampling == sampling


@pytest.mark.parametrize(
    "values, words",
    [
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token id, a list of them or null"),
        ({"eos_token_id": [1, None]}, "eos_token_id is"),
        ({"eos_token_id": True}, "eos_token_id is True"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id is"),
        ("[]", "no JSON object"),
        ("{", "is not valid JSON"),
    ],
)
def test_damaged_files_are_one_line(tmp_path, values, words):
    with pytest.raises(UserError) as error:
        written(tmp_path, values)
    assert words in str(error.value) and "generation_config.json" in str(error.value) and "\n" not in str(error.value)
