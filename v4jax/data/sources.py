"""Loading of the documents that a config names: the embedded corpus or the user's own .txt and .jsonl files."""

from __future__ import annotations

import glob
import os
import pathlib

from v4jax.config import SOURCES, Data
from v4jax.core import untrusted_json
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path
from v4jax.data.corpus import Corpus, Document, load_corpus

EMBEDDED = SOURCES[0]
HELDOUT_EVERY = 50  # one of this many documents is held out
HELDOUT_TAIL = 0.02  # fraction of the text that is held out if there is only one document


def load_documents(config: Data) -> Corpus:
    """Load the training and held-out documents of `data.source` and `data.heldout`.

    A .txt file is one document. Each line of a .jsonl file is one document, its field "text". Documents that contain
    only white space are dropped. The first rule that applies selects the held-out documents:

    1. the files of `data.heldout`, which are excluded from training
    2. the split of the embedded corpus
    3. every 50th document, or the last one of fewer than 50
    4. the last 2 % of a single document, cut at the end of a line

    Args:
        config: the group `data` of a config.

    Raises:
        UserError: a file cannot be read; the message names the file, and the byte or line of the problem.
    """
    heldout_files = find_files(config.heldout) if config.heldout else []
    if config.source == EMBEDDED:
        corpus = load_corpus()
        return Corpus(corpus.train, read_files(heldout_files)) if heldout_files else corpus
    files = [path for path in find_files(config.source) if path not in heldout_files]
    if not files:
        raise UserError(f"data.heldout {config.heldout!r} covers every file of data.source {config.source!r}")
    documents = read_files(files)
    if heldout_files:
        return Corpus(documents, read_files(heldout_files))
    return hold_out(documents)


def find_files(spec: str) -> list[pathlib.Path]:
    """Return the sorted absolute paths of the .txt and .jsonl files that `spec` selects.

    Args:
        spec: a file, a directory (searched recursively), or a glob.

    Raises:
        UserError: `spec` selects no such file.
    """
    path = local_path(spec, "data").expanduser()
    if path.is_dir():
        found = path.rglob("*")
    elif path.exists():
        found = [path]
    else:
        found = _expand(path)
    found = [p for p in found if p.is_file()]
    if not found and not path.is_dir():
        raise UserError(f"no file matches {spec!r}; give a path, a directory, a glob or {EMBEDDED!r}")
    files = sorted(p.resolve() for p in found if p.suffix in (".txt", ".jsonl"))
    if not files:
        raise UserError(f"no .txt or .jsonl file in {spec!r}")
    return files


def _expand(path: pathlib.Path) -> list[pathlib.Path]:
    """Return the files that match a glob. Its longest prefix that is an existing directory is taken literally."""
    root = next(parent for parent in path.parents if parent.is_dir())
    return [root / name for name in glob.glob(str(path.relative_to(root)), root_dir=root, recursive=True)]


def read_files(files: list[pathlib.Path]) -> list[Document]:
    """Read all documents of `files` that contain more than white space. Raises UserError if there is none."""
    documents = [d for path in files for d in _read_file(path) if d.text and not d.text.isspace()]
    if not documents:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise UserError(f"no text in {files[0]}{more}: every document is empty")
    return documents


def hold_out(documents: list[Document]) -> Corpus:
    """Split documents by rules 3 and 4 of `load_documents`. Raises UserError if a single document is too short."""
    if len(documents) > 1:
        last = HELDOUT_EVERY if len(documents) >= HELDOUT_EVERY else len(documents)
        return Corpus([d for i, d in enumerate(documents, 1) if i % last], documents[last - 1 :: last])
    name, text = documents[0].name, documents[0].text
    at = int(len(text) * (1 - HELDOUT_TAIL))
    at = text.rfind("\n", len(text) // 2, at) + 1 or at
    if not text[:at].strip() or not text[at:].strip():
        raise UserError(f"{name} is too short to hold out {HELDOUT_TAIL:.0%} of it; give data.heldout")
    return Corpus([Document(name, text[:at])], [Document(f"{name} (end)", text[at:])])


def _read_file(path: pathlib.Path) -> list[Document]:
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4  # memory holds the bytes and the decoded text
    if (size := path.stat().st_size) > most:
        raise UserError(f"{path} has {size:,} bytes, more than a quarter of this machine's memory; split it")
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte offset {error.start}); convert it first") from error
    if path.suffix == ".txt":
        return [Document(str(path), text)]
    lines = enumerate(text.split("\n"), 1)
    return [_parse_line(f"{path}:{number}", line) for number, line in lines if line.strip()]


def _parse_line(where: str, line: str) -> Document:
    try:
        record = untrusted_json.parse(line, untrusted_json.LARGE, strict=False)
    except untrusted_json.JsonError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where} is not an object with a string field 'text'")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has half a surrogate pair in 'text'; it has no UTF-8 form") from error
    return Document(where, text)
