import hashlib
import json
import shutil

import pytest

from v4jax.core.errors import UserError
from v4jax.data.build_corpus import clean_play
from v4jax.data.corpus import ASSETS, load_corpus


def test_split_and_provenance():
    corpus = load_corpus()
    provenance = json.loads((ASSETS / "provenance.json").read_text("utf-8"))
    assert {d.name for d in corpus.heldout} == {"Hamlet", "The Tempest", "Job", "Revelation"}
    listed = [name for source in provenance["sources"].values() for name in source["documents"]]
    assert sorted(d.name for d in corpus.train + corpus.heldout) == sorted(listed)
    assert len(set(listed)) == len(listed) == provenance["corpus"]["documents"] == 104
    assert sum(len(d.text.encode()) for d in corpus.train + corpus.heldout) == provenance["corpus"]["text_bytes"]


def test_text_is_clean():
    corpus = load_corpus()
    texts = {d.name: d.text for d in corpus.train + corpus.heldout}
    assert texts["Hamlet"].startswith("Hamlet\n\nACT I\n\nSCENE I. Elsinore. A platform before the castle.\n\nFRAN")
    assert "\n\nHAMLET:\nTo be, or not to be: that is the question:\nWhether 'tis nobler" in texts["Hamlet"]
    assert texts["Genesis"].startswith("Genesis\n\n1:1 In the beginning God created the heaven and the earth.\n1:2 And")
    assert texts["Measure for Measure"].startswith("Measure for Measure\n\nACT I\n")
    for name, text in texts.items():
        assert text.startswith(name) and text.endswith("\n") and "\n\n\n" not in text, name
        assert not set(text) & set("*_\\#\r\t"), name
        assert " \n" not in text, name


def test_clean_play():
    markdown = "# Play\n\n### SCENE I  \n\n_Enter A &\nB_\n\n\n\n**KING \\[to B\\]**  \n\\--Speak,  \nor **die**.  \n"
    assert clean_play(markdown) == "Play\n\nSCENE I\n\nEnter A &\nB\n\nKING [to B]:\n--Speak,\nor die.\n"


def test_damage_is_noticed(tmp_path):
    with pytest.raises(UserError, match="lacks .*provenance.json; reinstall"):
        load_corpus(tmp_path)
    shutil.copytree(ASSETS, tmp_path, dirs_exist_ok=True)
    packed = bytearray((tmp_path / "corpus.jsonl.xz").read_bytes())
    packed[1000] ^= 1
    (tmp_path / "corpus.jsonl.xz").write_bytes(packed)
    with pytest.raises(UserError, match="is damaged"):
        load_corpus(tmp_path)


def test_checksum_is_that_of_the_file():
    provenance = json.loads((ASSETS / "provenance.json").read_text("utf-8"))
    packed = (ASSETS / provenance["corpus"]["file"]).read_bytes()
    assert hashlib.sha256(packed).hexdigest() == provenance["corpus"]["sha256"]
