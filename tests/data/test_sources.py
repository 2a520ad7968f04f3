import json

import pytest

from v4jax.config import Data
from v4jax.core.errors import UserError
from v4jax.data.corpus import Document
from v4jax.data.sources import hold_out, load_documents


def _texts(documents):
    return [d.text for d in documents]


def test_directory_glob_and_heldout_files(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("alpha\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfbeta")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "notes.md").write_text("not read")
    (tmp_path / "deep" / "c.jsonl").write_text('{"text": "one\\u2028"}\n\n{"text": " "}\n{"text": "two", "id": 2}\n')
    corpus = load_documents(Data(source=str(tmp_path), heldout=str(tmp_path / "b.*")))
    assert _texts(corpus.train) == ["alpha\n", "one\u2028", "two"]
    assert _texts(corpus.heldout) == ["beta"]
    assert corpus.train[-1].name.endswith("c.jsonl:4")
    assert _texts(load_documents(Data(source=f"{tmp_path}/*.txt")).train) == ["alpha\n"]
    assert len(load_documents(Data(heldout=str(tmp_path / "a.txt"))).train) == 100


def test_every_fiftieth_document_is_held_out():
    documents = [Document(str(i), "x") for i in range(120)]
    assert [d.name for d in hold_out(documents).heldout] == ["49", "99"]
    assert [d.name for d in hold_out(documents[:3]).heldout] == ["2"]
    for n in (2, 3, 49, 50, 120):
        corpus = hold_out(documents[:n])
        assert sorted(corpus.train + corpus.heldout, key=lambda d: int(d.name)) == documents[:n]


def test_one_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(1000))
    corpus = hold_out([Document("d", text)])
    (train,), (heldout,) = corpus.train, corpus.heldout
    assert train.text + heldout.text == text and train.text.endswith("\n")
    assert 0.015 < len(heldout.text) / len(text) < 0.025
    assert len(hold_out([Document("d", "x" * 1000)]).heldout[0].text) == 20
    with pytest.raises(UserError, match="too short to hold out 2%"):
        hold_out([Document("d", "x")])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("bad.txt", b"abc\xff", r"bad.txt is not UTF-8 \(byte offset 3\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "bad.jsonl:2 is not valid JSON"),
        ("bad.jsonl", b'{"text": "a"}\n{"txt": "b"}', "bad.jsonl:2 is not an object with a string field 'text'"),
        ("bad.jsonl", b'["text"]', "bad.jsonl:1 is not an object"),
        ("bad.jsonl", json.dumps({"text": "\ud800"}).encode(), "bad.jsonl:1 has half a surrogate pair"),
        ("empty.txt", b"", "no text in .*empty.txt: every document is empty"),
        ("picture.png", b"", "no .txt or .jsonl file in"),
    ],
)
def test_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_documents(Data(source=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_missing_and_swallowed_sources(tmp_path):
    with pytest.raises(UserError, match="no file matches .*nowhere"):
        load_documents(Data(source=str(tmp_path / "nowhere")))
    (tmp_path / "a.txt").write_text("alpha")
    with pytest.raises(UserError, match="covers every file"):
        load_documents(Data(source=str(tmp_path), heldout=str(tmp_path)))
