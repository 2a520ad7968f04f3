"""The text that a checkpoint is scored on: the embedded one, or what the user names; never a path that it stores."""

import dataclasses

import pytest

from v4jax import config as config_lib
from v4jax.checkpoint import directory
from v4jax.core.errors import UserError
from v4jax.evals.heldout import config_of


def checkpoint(path, **data):
    tiny = config_lib.load("tiny")
    directory.save_config(path, dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, **data)))
    return str(path)


def test_the_embedded_corpus_needs_no_word(tmp_path):
    assert config_of(checkpoint(tmp_path)).data.source == "shakespeare-kjv"


def test_stored_paths_are_named_and_not_read(tmp_path):
    path = checkpoint(tmp_path, source="/secret/*.txt", heldout="/secret/held.txt")
    with pytest.raises(UserError, match=r"name the text, such as --data=/secret/\*.txt --heldout=/secret/held.txt"):
        config_of(path)
    assert config_of(path, "mine.txt").data.source == "mine.txt" and config_of(path, "mine.txt").data.heldout == ""


def test_a_stored_heldout_path_beside_the_embedded_corpus(tmp_path):
    path = checkpoint(tmp_path, heldout="held.txt")
    with pytest.raises(UserError, match="such as --heldout=held.txt"):
        config_of(path)
    data = config_of(path, heldout="held.txt").data
    assert (data.source, data.heldout) == ("shakespeare-kjv", "held.txt")
