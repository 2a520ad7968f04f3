"""Packing of tokenized documents into rows of fixed length. Long documents are cut, short ones share a row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import xxhash


class PackedRows:
    """Rows of `seq_len` tokens, assembled on access from one flat token array.

    A document is tok = [bos] + ids + [eos]. Its piece r has the inputs tok[r*T : (r+1)*T], and its targets are shifted
    by one token, so every token except bos is a target exactly once. Pieces shorter than a row are packed by best fit
    decreasing. Each piece starts at a multiple of `align` in its row. Rows, and the pieces in a row, are in the order
    of the documents.

    `rows[i]` is a dict of int32 arrays [T]:
      tokens_T     inputs; eos in padding, which is masked by segment 0 and target -1
      targets_T    the next token, or -1 in padding
      targets2_T   the token after the next one in the same document, or -1 if there is none
      segments_T   1, 2, ... for the pieces of the row, 0 in padding
      positions_T  position inside the piece, from 0; 0 in padding

    Args:
        documents: token ids of each document, without bos and eos.
        seq_len: T, tokens per row; a multiple of `align`.
        align: alignment of pieces in tokens.
        bos_id: id that starts each document.
        eos_id: id that ends each document.
    """

    def __init__(self, documents: Iterable[Sequence[int]], seq_len: int, align: int, bos_id: int, eos_id: int):
        if seq_len % align:
            raise ValueError(f"seq_len {seq_len} is not a multiple of align {align}")
        self.seq_len, self.align, self.eos_id = seq_len, align, eos_id
        parts = [np.array([bos_id, *ids, eos_id], np.int32) for ids in documents]
        self._tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
        doc_end = np.cumsum([len(part) for part in parts], dtype=np.int64)
        doc_start = doc_end - [len(part) for part in parts]

        pieces_per_doc = -(-(doc_end - doc_start - 1) // seq_len)
        document = np.repeat(np.arange(len(parts)), pieces_per_doc)
        number = np.arange(len(document)) - np.repeat(np.cumsum(pieces_per_doc) - pieces_per_doc, pieces_per_doc)
        start = doc_start[document] + number * seq_len
        length = np.minimum(seq_len, doc_end[document] - 1 - start)

        row_of = _assign_rows(-(-length // align), seq_len // align)
        order = np.argsort(row_of, kind="stable")
        self._start, self._length, self._doc_end = start[order], length[order], doc_end[document][order]
        self._row_start = np.concatenate([[0], np.cumsum(np.bincount(row_of))]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._row_start) - 1

    def digest(self) -> str:
        """Return the xxh3-128 of all tokens and of the layout of the rows, as 32 hexadecimal digits."""
        state = xxhash.xxh3_128()
        for array in (self._tokens, self._start, self._length, self._row_start):
            state.update(np.ascontiguousarray(array).view(np.uint8))
        return state.hexdigest()

    @property
    def waste(self) -> float:
        """Fraction of positions that are padding."""
        return 1 - self._length.sum() / (len(self) * self.seq_len)

    def targets(self, rows: Iterable[int]) -> np.ndarray:
        """Return all targets of the given rows, in order, without padding, int32 [N]."""
        pieces = [p for row in rows for p in range(self._row_start[row], self._row_start[row + 1])]
        return np.concatenate([self._tokens[self._start[p] + 1 : self._start[p] + self._length[p] + 1] for p in pieces])

    def empty_row(self) -> dict[str, np.ndarray]:
        """Return a row of padding."""
        return empty_row(self.seq_len, self.eos_id)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row, at = self.empty_row(), 0
        pieces = range(self._row_start[index], self._row_start[index + 1])
        for segment, piece in enumerate(pieces, 1):
            start, n = self._start[piece], self._length[piece]
            here = slice(at, at + n)
            row["tokens_T"][here] = self._tokens[start : start + n]
            row["targets_T"][here] = self._tokens[start + 1 : start + 1 + n]
            after = self._tokens[start + 2 : min(start + 2 + n, self._doc_end[piece])]
            row["targets2_T"][at : at + len(after)] = after
            row["segments_T"][here] = segment
            row["positions_T"][here] = np.arange(n)
            at += -(-n // self.align) * self.align
        return row


def empty_row(seq_len: int, eos_id: int) -> dict[str, np.ndarray]:
    """Return a row of padding, as a dict like the rows of `PackedRows`."""
    row = {name: np.zeros(seq_len, np.int32) for name in ("segments_T", "positions_T")}
    row |= {name: np.full(seq_len, -1, np.int32) for name in ("targets_T", "targets2_T")}
    return {"tokens_T": np.full(seq_len, eos_id, np.int32), **row}


def _assign_rows(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Assign every piece to a row by best fit decreasing. Rows are numbered in the order of their first pieces.

    Open rows are grouped by their free space, and a bit mask records which amounts of free space exist. The tightest
    fit is the lowest set bit of the mask from the size of the piece on. The cost per piece does not depend on the
    number of rows.

    Args:
        sizes: size of each piece in units of the alignment, int [N].
        capacity: size of a row in the same units.

    Returns:
        Row number of each piece, int64 [N].
    """
    room_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, rows = 0, 0
    row_of = np.zeros(len(sizes), np.int64)
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fits = rooms >> size
        if fits:
            room = size + (fits & -fits).bit_length() - 1
            row = room_rows[room].pop()
            rooms ^= (not room_rows[room]) << room
        else:
            room, row, rows = capacity, rows, rows + 1
        row_of[piece] = row
        if room > size:
            room_rows[room - size].append(row)
            rooms |= 1 << (room - size)
    _, first, row_of = np.unique(row_of, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[row_of]
