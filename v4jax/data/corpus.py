"""The embedded corpus: Shakespeare's plays and the King James Bible, public domain, 104 documents, 9.3 MB.

`assets/corpus.jsonl.xz` holds one JSON object per line, {"name", "text"}. `assets/provenance.json` records the source
of each document, the held-out documents, and the SHA-256 of the corpus file. `v4jax/data/build_corpus.py` builds both.
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
    """One text: a play, a book, a file or a JSONL line. A segment of a packed row never spans two documents."""

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
