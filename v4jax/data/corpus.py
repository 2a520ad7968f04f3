"""The embedded corpus: Shakespeare's plays and the King James Bible, public domain, 105 documents, 9.4 MB.

`assets/corpus.jsonl.xz` holds one JSON object a line, {"name", "text"}; `assets/provenance.json` says where each came
from, which are held out and what the file must hash to. `v4jax/data/build_corpus.py` makes both.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import pathlib
from dataclasses import dataclass

from v4jax.core.errors import UserError

ASSETS = pathlib.Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Document:
    """One text that is never mixed with another: a play, a book, a file or a JSONL line."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to evaluate on."""

    train: list[Document]
    heldout: list[Document]


def load_corpus(assets: pathlib.Path = ASSETS) -> Corpus:
    """Read and verify the embedded corpus. Raises UserError if a file is missing or its checksum does not match."""
    path = assets / "corpus.jsonl.xz"
    try:
        provenance = json.loads((assets / "provenance.json").read_text("utf-8"))
        packed = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"the embedded corpus lacks {error.filename}; reinstall v4jax") from error
    if hashlib.sha256(packed).hexdigest() != provenance["corpus"]["sha256"]:
        raise UserError(f"{path} is damaged (its SHA-256 is not the one in provenance.json); reinstall v4jax")
    documents = [Document(**json.loads(line)) for line in lzma.decompress(packed).splitlines()]
    heldout = set(provenance["split"]["heldout"])
    return Corpus(
        train=[d for d in documents if d.name not in heldout],
        heldout=[d for d in documents if d.name in heldout],
    )
