"""Batches for training and evaluation: a grain pipeline over packed rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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

_ENDLESS = 1 << 40  # rows of a synthetic source
_HELDOUT_NEEDLES = 64


class BatchIterator:
    """Endless or one-pass batches; its state is a row and fits any batch size.

    The state also holds the identity of the data (`data/fingerprint.py`). A state of other data is refused, or, where
    `data.on_change` is "restart", the new data is read from its first row and the former identity is kept in
    `former`: [{"rows": rows that were read of it, **identity}].
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

    def get_state(self) -> dict[str, object]:
        """JSON of the place after the last batch: the next row of the global order, and what it belongs to."""
        return {"row": self._row, "identity": self._batches.identity, "former": self._former}

    def set_state(self, state: dict) -> None:
        """Go on from a state, also one of another batch size. Raises UserError if it belongs to other data."""
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
    """An iterable of batches; `iter()` gives a `BatchIterator`.

    A batch is a dict of int32 arrays [B, T], tokens_BT targets_BT targets2_BT segments_BT positions_BT, as described in
    `PackedRows`; B is this process' share of the global batch.

    dataset_from(row): the batches from this row of the global order on. size: rows of a global batch. identity: what
    tells these rows and their order from others. restart: a state of other data starts this data anew.

    `num_targets` and `num_bytes` count one pass over all processes. Bits per byte is
    sum(nll in nats over targets >= 0) / ln 2 / num_bytes. The model pays for predicting eos, which ends each document
    and counts 0 bytes; bos is never a target and costs nothing; any other target counts the UTF-8 bytes it stands for.
    Synthetic rows (`NeedleRows`) have no end and stand for no text: both are 0.
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
    """Batches of `split`, "train" or "heldout", of the documents `config.data` names.

    Training shuffles all rows anew each epoch by `seed` and never ends. Held-out is one pass in order, over
    `train.eval_rows` rows spread evenly (0: all), its last batch filled up with empty rows; `seed` plays no part.
    Process i of n holds rows [i*B/n, (i+1)*B/n) of every global batch, so the batches do not depend on n.
    The source "needle" is synthetic: it takes no tokenizer, its rows follow from `seed` and never repeat, and held-out
    are 64 others if `train.eval_rows` does not say how many.
    Raises UserError for data that cannot be read, a tokenizer the model does not fit, or B not divisible by n.
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
    """Row numbers filled up with -1 to whole batches, and how many of those there are."""
    batches = -(-len(chosen) // size)
    return grain.MapDataset.source(np.pad(chosen, (0, batches * size - len(chosen)), constant_values=-1)), batches


def _batched(order: grain.MapDataset, rows, size: int, mine: slice) -> Callable[[int], grain.IterDataset]:
    """A function that gives this process' share of batches of `size` rows, from a row of this order on."""

    def dataset_from(row: int) -> grain.IterDataset:
        numbers = lambda batch: [order[i] for i in range(row + batch * size, row + (batch + 1) * size)[mine]]
        count = min(len(order) - row, _ENDLESS) // size
        dataset = grain.MapDataset.range(count).map(lambda batch: _stack(rows, numbers(batch)))
        return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))

    return dataset_from


def _stack(rows: PackedRows | NeedleRows, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """The rows as one batch; -1 stands for an empty row."""
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
