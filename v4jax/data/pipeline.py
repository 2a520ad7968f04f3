"""Batches for training and evaluation, made by a grain pipeline over packed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from v4jax.config import Config
from v4jax.core.errors import UserError
from v4jax.data import fingerprint
from v4jax.data.needle import SOURCE as NEEDLE
from v4jax.data.needle import NeedleRows
from v4jax.data.packing import PackedRows
from v4jax.data.sources import load_documents
from v4jax.data.tokenizer import CONFIG_NAME, Tokenizer, token_bytes

_ENDLESS = 1 << 40  # number of rows of a synthetic source
_HELDOUT_NEEDLES = 64  # held-out rows of the source "needle" if `train.eval_rows` is 0


class BatchIterator:
    """Iterator over endless or one-pass batches, with a state that can be saved.

    The state is the number of the next row, so it fits any batch size. It also holds the identity of the data
    (`data/fingerprint.py`). A state of other data is refused. If `data.on_change` is "restart", the iterator instead
    reads the new data from its first row and records the old identity in the state's list `former`:
    [{"rows": number of rows read from that data, **identity}].
    """

    def __init__(self, batches: BatchDataset):
        self._batches, self._former = batches, []
        self._start_at(0)

    def _start_at(self, row: int) -> None:
        self._row = row
        self._iterator = iter(self._batches.dataset_from(row))

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._row += self._batches.size
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the position after the last batch as JSON values.

        Returns:
            {"row": next row of the global order, "identity": identity of the data, "former": earlier identities}.
        """
        return {"row": self._row, "identity": self._batches.identity, "former": self._former}

    def set_state(self, state: dict) -> None:
        """Continue from a state, which may come from another batch size.

        Raises:
            UserError: the state belongs to other data, and `data.on_change` is not "restart".
        """
        old, new = state["identity"], self._batches.identity
        self._former = list(state["former"])
        if not fingerprint.changed(old, new):
            self._start_at(state["row"])
        elif self._batches.restart:
            self._former.append({"rows": state["row"], **old})
            self._start_at(0)
        else:
            raise fingerprint.refusal(old, new)


@dataclass(frozen=True)
class BatchDataset:
    """An iterable of batches. `iter()` returns a `BatchIterator`.

    A batch is a dict of int32 arrays [B, T], tokens_BT targets_BT targets2_BT segments_BT positions_BT, as described in
    `PackedRows`. B is this process's share of the global batch.

    Bits per byte is sum(nll in nats over targets >= 0) / ln 2 / num_bytes. The target eos, which ends each document,
    contributes its loss and 0 bytes. bos is never a target and contributes nothing. Any other target contributes its
    loss and its number of UTF-8 bytes.

    Attributes:
        dataset_from: function from a row number of the global order to the batches from that row on.
        rows: the rows.
        batches: number of batches; None if the batches are endless.
        num_targets: targets in one pass over the rows of all processes; 0 for synthetic rows (`NeedleRows`).
        num_bytes: UTF-8 bytes of these targets; 0 for synthetic rows.
        size: rows per global batch.
        identity: fields that identify the rows and their order (`data/fingerprint.py`).
        restart: whether an iterator that gets the state of other data starts at row 0 instead of raising UserError.
    """

    dataset_from: Callable[[int], grain.IterDataset]
    rows: PackedRows | NeedleRows
    batches: int | None  # None: endless
    num_targets: int
    num_bytes: int
    size: int
    identity: dict[str, object]
    restart: bool

    def __iter__(self) -> BatchIterator:
        return BatchIterator(self)

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("training batches never end")
        return self.batches


def make_dataset(
    config: Config,
    tokenizer: Tokenizer | None,
    split: str = "train",
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchDataset:
    """Make the batches of one split of the documents that `config.data` names.

    Training batches are endless; each epoch shuffles all rows again. Held-out batches are one pass in order over
    `train.eval_rows` evenly spaced rows (0 means all); empty rows fill the last batch. Process i of n gets the rows
    [i*B/n, (i+1)*B/n) of every global batch of B rows, so the global batches do not depend on n.

    The source "needle" is synthetic. Its training rows follow from `seed` and never repeat. Its held-out rows differ
    from all training rows; there are `train.eval_rows` of them, or 64 if that is 0.

    Args:
        config: config of the run.
        tokenizer: tokenizer of the documents; the source "needle" needs none.
        split: "train" or "heldout".
        seed: seed of the shuffle and of synthetic training rows; it does not affect held-out batches.
        process_index: i, number of this process.
        process_count: n, number of processes.

    Returns:
        The batches of this process.

    Raises:
        UserError: the data cannot be read, the tokenizer does not fit the model, or B is not divisible by n.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', got {split!r}")
    size = config.train.batch_size
    if size % process_count:
        raise UserError(f"train.batch_size {size} is not a multiple of the {process_count} processes")
    mine = slice(process_index * (size // process_count), (process_index + 1) * (size // process_count))
    if config.data.source == NEEDLE:
        return _needle_batches(config, split, seed, mine)
    _check(config, tokenizer)
    corpus = load_documents(config.data)
    documents = corpus.train if split == "train" else corpus.heldout
    rows = PackedRows(
        tokenizer.encode_batch([d.text for d in documents]),
        seq_len=config.data.seq_len,
        align=config.model.alignment,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    if split == "train":
        chosen = np.arange(len(rows))
        order, batches = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat(), None
    else:
        count = min(config.train.eval_rows or len(rows), len(rows))
        chosen = np.arange(count) * len(rows) // count
        order, batches = _one_pass(chosen, size)
    targets_N = rows.targets(chosen)
    num_bytes = int(token_bytes(tokenizer)[targets_N].sum())
    known = {
        "documents": fingerprint.of_documents(corpus.train),
        "heldout": fingerprint.of_documents(corpus.heldout),
        "tokens": rows.digest(),
        "seq_len": config.data.seq_len,
        "align": config.model.alignment,
        "seed": seed,
        "order": fingerprint.of_order(order),
    }
    return BatchDataset(
        _batched(order, rows, size, mine),
        rows,
        batches,
        len(targets_N),
        num_bytes,
        size,
        known,
        config.data.on_change == "restart",
    )


def _needle_batches(config: Config, split: str, seed: int, mine: slice) -> BatchDataset:
    data, size = config.data, config.train.batch_size
    rows = NeedleRows(config.model, data.seq_len, data.questions, seed if split == "train" else None)
    if split == "train":
        order, batches = grain.MapDataset.range(_ENDLESS), None
    else:
        order, batches = _one_pass(np.arange(config.train.eval_rows or _HELDOUT_NEEDLES), size)
    known = {
        "documents": NEEDLE,
        "tokens": fingerprint.of_row(rows[0]),
        "seq_len": data.seq_len,
        "questions": data.questions,
        "seed": seed,
    }
    return BatchDataset(
        _batched(order, rows, size, mine), rows, batches, 0, 0, size, known, data.on_change == "restart"
    )


def _one_pass(chosen: np.ndarray, size: int) -> tuple[grain.MapDataset, int]:
    """Return the row numbers, padded with -1 to full batches, and the number of batches."""
    batches = -(-len(chosen) // size)
    return grain.MapDataset.source(np.pad(chosen, (0, batches * size - len(chosen)), constant_values=-1)), batches


def _batched(order: grain.MapDataset, rows, size: int, mine: slice) -> Callable[[int], grain.IterDataset]:
    """Return the function `dataset_from` of a `BatchDataset`.

    Args:
        order: row numbers in their global order.
        rows: the rows.
        size: rows per global batch.
        mine: this process's slice of a global batch.
    """

    def dataset_from(row: int) -> grain.IterDataset:
        numbers = lambda batch: [order[i] for i in range(row + batch * size, row + (batch + 1) * size)[mine]]
        count = min(len(order) - row, _ENDLESS) // size
        dataset = grain.MapDataset.range(count).map(lambda batch: _stack(rows, numbers(batch)))
        return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))

    return dataset_from


def _stack(rows: PackedRows | NeedleRows, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Stack rows to one batch. The row number -1 denotes an empty row."""
    picked = [rows[i] if i >= 0 else rows.empty_row() for i in indices]
    return {name.replace("_T", "_BT"): np.stack([row[name] for row in picked]) for name in picked[0]}


def _check(config: Config, tokenizer: Tokenizer) -> None:
    model = config.model
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids but model.vocab_size is {model.vocab_size}")
    bos_ids = () if model.bos_id is None else (model.bos_id,)
    for name, known in (("bos_id", bos_ids), ("eos_id", model.eos_ids)):
        found = getattr(tokenizer, name)
        if found is None:
            raise UserError(f"the tokenizer has no {name}, which rows of documents need; name it in {CONFIG_NAME}")
        if known and found not in known:
            raise UserError(f"model.{name} is {getattr(model, name)} but the tokenizer's is {found}")
