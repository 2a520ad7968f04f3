"""JSON of unknown origin: what is refused, with which words, and that it is refused at once."""

import ast
import json
import os
import pathlib
import time

import pytest

from v4jax.core.errors import UserError, printable
from v4jax.core.untrusted_json import LARGE, JsonError, parse, read_object

DEEP = 200_000


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("[" * DEEP, "nested too deeply"),
        ('{"a":' * DEEP, "nested too deeply"),
        ("[" * 66 + "]" * 66, "nested too deeply"),
        ('{"a": 1, "a": 2}', "a name occurs twice"),
        ('{"a": {"b": 1, "b": 1}}', "a name occurs twice"),
        ("[NaN]", "NaN is no JSON number"),
        ("[-Infinity]", "-Infinity is no JSON number"),
        ("[1e999]", "the number 1e999 overflows"),
        ("1" * 5000, "4300"),
        ('["\\ud800"]', "half a surrogate pair"),
        (b'["\xff"]', "not UTF-8 at byte 2"),
        (b"\xff\xfe[\x00]\x00", "not UTF-8"),
        ("[" + "0," * 1_100_000 + "0]", "too many values"),
        (" " * ((16 << 20) + 1), "are the most that is read"),
        ("[1,]", "Expecting value"),
        ("{} {}", "Extra data"),
    ],
)
def test_what_is_refused(text, complaint):
    start = time.process_time()
    with pytest.raises(JsonError, match=complaint):
        parse(text)
    assert time.process_time() - start < 2


def test_what_is_read():
    value = {"a": [1, -2.5e3, True, None, "é\n"], "deep": json.loads("[" * 60 + "]" * 60), "": {}}
    assert parse(json.dumps(value)) == parse(b"\xef\xbb\xbf" + json.dumps(value).encode()) == value
    assert parse('{"score": NaN, "title": "\\ud800"}', strict=False)["title"] == "\ud800"
    assert len(parse("[" + "0," * 2_000_000 + "0]", LARGE)) == 2_000_001
    assert len(parse(json.dumps({"text": ',:"\\[{' * 1_000_000}))["text"]) == 6_000_000  # text is no values


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda path: os.mkfifo(path), "no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
        (lambda path: path.mkdir(), "no regular file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (lambda path: path.write_bytes(b"") or os.truncate(path, 1 << 40), "are the most that is read"),
        (lambda path: path.write_bytes(b"[1]"), "holds no JSON object"),
        (lambda path: None, "No such file"),
    ],
)
def test_files_that_are_no_object(tmp_path, make, complaint):
    make(tmp_path / "x.json")
    with pytest.raises(UserError, match=complaint) as error:
        read_object(tmp_path / "x.json")
    assert "x.json" in str(error.value)


# --- the one reader ----------------------------------------------------------------------------------------------

ROOT = pathlib.Path(__file__).resolve().parents[2] / "v4jax"
READERS = {"load", "loads", "JSONDecoder", "decoder", "scanner"}  # names of the module json that parse
TRUSTED = {  # file of v4jax -> why it parses JSON itself
    "core/untrusted_json.py": "the reader of untrusted JSON",
    "checkpoint/checksums.py": "text that it has just written itself",
    "data/build_corpus.py": "an archive whose SHA-256 was compared",
    "data/corpus.py": "files of the package",
    "data/tokenizer.py": "text that the tokenizers library wrote",
}


def json_readers(root: pathlib.Path) -> dict[str, list[int]]:
    """{file: lines} of all uses of a parser of the module json, under whatever name it was imported."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imports = [node for node in nodes if isinstance(node, ast.Import)]
        modules = {alias.asname or "json" for node in imports for alias in node.names if alias.name == "json"}
        lines = [
            node.lineno
            for node in nodes
            if (isinstance(node, ast.Attribute) and node.attr in READERS and getattr(node.value, "id", "") in modules)
            or (isinstance(node, ast.ImportFrom) and node.module in ("json", "json.decoder", "json.scanner"))
        ]
        if lines:
            found[path.relative_to(root).as_posix()] = lines
    return found


def test_nothing_else_reads_json():
    assert set(json_readers(ROOT)) == set(TRUSTED)


@pytest.mark.parametrize(
    "source",
    [
        "import json\ndef f(path):\n    return json.load(open(path))",
        "import json as j\nlines = map(j.loads, [])",
        "from json import loads",
        "import json\njson.JSONDecoder().raw_decode('1')",
    ],
)
def test_json_finder_sees_a_planted_breach(tmp_path, source):
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "b.py").write_text("import json\njson.dumps(1)\nfrom v4jax.core import untrusted_json")
    assert list(json_readers(tmp_path)) == ["a.py"]


# --- messages ----------------------------------------------------------------------------------------------------


def test_messages_steer_no_terminal():
    text = str(UserError("the tensor 'a\x1b[2J\x07\u202e\x9b31m\ud800' is\nunknown;  remove it"))
    assert text == "the tensor 'a\\x1b[2J\\x07\\u202e\\x9b31m\\ud800' is unknown; remove it"
    assert text.isprintable() and printable("naïve 日本 '✓'") == "naïve 日本 '✓'"


@pytest.mark.parametrize("value", ["x" * 5000, "a b" * 3000, "é'" * 1000])
def test_values_in_messages_are_cut_and_the_cure_stays(value):
    text = str(UserError(f"config.json: hidden_act is {value!r}; v4jax supports 'silu' only"))
    assert len(text) < 300 or "'" in value
    assert len(text) <= 1016 and text.startswith("config.json: hidden_act is") and text.endswith("supports 'silu' only")


def test_lists_in_messages_are_cut():
    text = str(UserError(f"sizes are {list(range(5000))}, not 3; give three"))
    assert len(text) < 300 and text.startswith("sizes are [0, 1, 2,") and text.endswith("...], not 3; give three")


def test_usual_messages_stay_as_they_are():
    text = "no config 'tinny'; did you mean 'tiny'? The model's own is [1, 2], \"quoted\", runs/tiny"
    assert str(UserError(text)) == text
