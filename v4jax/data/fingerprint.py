"""Identity of the rows of a run and of their order, by which a resumed run detects that its data has changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import xxhash

from v4jax.core.errors import UserError
from v4jax.data.corpus import Document

_ORDER_ROWS = 256  # row numbers at the start of the order that are hashed to represent it
# Field of an identity -> the setting that determines it.
_SETTINGS = {
    "documents": "data.source",
    "heldout": "data.heldout",
    "tokens": "data.tokenizer",
    "seq_len": "data.seq_len",
    "align": "the compression ratios of the model",
    "questions": "data.questions",
    "seed": "train.seed",
    "order": "the shuffle of this grain version",
}
# Field -> fields that influence it. A message does not name a changed field if one of these has changed too.
_FOLLOWS = {
    "tokens": ("documents", "seq_len", "align", "questions", "seed"),
    "order": ("documents", "tokens", "seq_len", "align", "seed"),
}


def of_documents(documents: Iterable[Document]) -> str:
    """Return the xxh3-128 of the texts in their order. Names and paths do not matter."""
    state = xxhash.xxh3_128()
    for document in documents:
        text = document.text.encode()
        state.update(len(text).to_bytes(8, "little") + text)
    return state.hexdigest()


def of_array(array: np.ndarray) -> str:
    """Return the xxh3-128 of the bytes of an array."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).view(np.uint8))


def of_row(row: Mapping[str, np.ndarray]) -> str:
    """Return the xxh3-128 of one row of a synthetic source, which represents all of its rows."""
    return of_array(np.stack([row[name] for name in sorted(row)]))


def of_order(order) -> str:
    """Return the xxh3-128 of the first 256 row numbers of a grain MapDataset."""
    return of_array(np.array([order[i] for i in range(min(_ORDER_ROWS, len(order)))], np.int64))


def changed(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Return the fields in which two identities differ, except those whose change another changed field explains."""
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return [name for name in names if not set(_FOLLOWS.get(name, ())) & set(names)]


def refusal(old: Mapping[str, object], new: Mapping[str, object]) -> UserError:
    """Return a one-line error that names the changed settings and explains how to continue."""
    parts = []
    for name in changed(old, new):
        values = f" {old.get(name)} -> {new.get(name)}" if type(new.get(name)) is int else ""
        parts.append(f"{_SETTINGS.get(name, name)}{values}")
    return UserError(
        f"the checkpoint's place in the data belongs to other data (changed: {', '.join(parts)}); go on with the "
        "former settings and files, train in another workdir, or add --config.data.on_change=restart, which reads the "
        "new data from its first row"
    )
