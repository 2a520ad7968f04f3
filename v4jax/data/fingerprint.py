"""What identifies the rows of a run and their order, so that a resume never reads other data unnoticed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import xxhash

from v4jax.core.errors import UserError
from v4jax.data.corpus import Document

_ORDER_ROWS = 256  # first rows of the order that stand for all of it
# Fields of an identity, with the setting that decides each.
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
# A field that differs because one of these does is not named.
_FOLLOWS = {
    "tokens": ("documents", "seq_len", "align", "questions", "seed"),
    "order": ("documents", "tokens", "seq_len", "align", "seed"),
}


def of_documents(documents: Iterable[Document]) -> str:
    """xxh3-128 of the texts in their order; their names and paths play no part."""
    state = xxhash.xxh3_128()
    for document in documents:
        text = document.text.encode()
        state.update(len(text).to_bytes(8, "little") + text)
    return state.hexdigest()


def of_array(array: np.ndarray) -> str:
    """xxh3-128 of an array's bytes."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).view(np.uint8))


def of_row(row: Mapping[str, np.ndarray]) -> str:
    """xxh3-128 of one row of a synthetic source, which stands for all of them."""
    return of_array(np.stack([row[name] for name in sorted(row)]))


def of_order(order) -> str:
    """xxh3-128 of the first row numbers of a grain MapDataset."""
    return of_array(np.array([order[i] for i in range(min(_ORDER_ROWS, len(order)))], np.int64))


def changed(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Fields in which two identities differ, without those that differ because another one does."""
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    return [name for name in names if not set(_FOLLOWS.get(name, ())) & set(names)]


def refusal(old: Mapping[str, object], new: Mapping[str, object]) -> UserError:
    """One line that names what differs and how to go on."""
    parts = []
    for name in changed(old, new):
        values = f" {old.get(name)} -> {new.get(name)}" if type(new.get(name)) is int else ""
        parts.append(f"{_SETTINGS.get(name, name)}{values}")
    return UserError(
        f"the checkpoint's place in the data belongs to other data (changed: {', '.join(parts)}); go on with the "
        "former settings and files, train in another workdir, or add --config.data.on_change=restart, which reads the "
        "new data from its first row"
    )
