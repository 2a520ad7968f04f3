"""Which part of a block's arrays a process of several holds, and how parts become arrays of another mesh.

A part is a form with boxes (`manifest.BlockSchema`): it says what a process holds, not how its devices share that, so that
processes that hold the same of a block write the same bytes under the same key, and one that holds all of it writes
what an engine without a mesh writes. Parts of any cut give any other part that they cover.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Sharding

from v4jax.cache.offload.block_file import Box, BlockSchema


def part_of(whole: BlockSchema, arrays: Sequence[jax.Array]) -> BlockSchema:
    """What this process holds of every block. arrays: [pages, *shape], in the order of the whole form's table.

    Raises ValueError if pages are split: then a block is not in all processes, and their caches are not one.
    """
    table, boxes = [], []
    for row, array in zip(whole.table, arrays, strict=True):
        indices = array.sharding.addressable_devices_indices_map(array.shape).values()
        held = sorted({_box(index, array.shape) for index in indices})
        if any(box[0] != (0, array.shape[0]) for box in held):
            raise ValueError(f"the pages of {row[0]} are split over devices; split what a page holds")
        for box in _joined([box[1:] for box in held]):
            table.append(row)
            boxes.append(box)
    form = BlockSchema(whole.kind, tuple(table), tuple(boxes))
    return whole if form.pieces == whole.pieces else form


def pack(part: BlockSchema, rows: Mapping[str, jax.Array]) -> np.ndarray:
    """The bytes of this process' part, uint8 [bytes], of one block's arrays by name, each [*shape]."""
    shards = lambda name: rows[name].addressable_shards
    return _built(part, {
        name: [(_box(shard.index, rows[name].shape), np.asarray(shard.data)) for shard in shards(name)] for name in rows
    })  # fmt: skip


def unpack(part: BlockSchema, payload: np.ndarray, shardings: Mapping[str, Sharding]) -> dict[str, jax.Array]:
    """The inverse of `pack` on all processes together: arrays by name, on the devices that the shardings say."""
    pieces, out = _pieces([(part, payload)]), {}
    for name, dtype, shape in part.whole.table:

        def region(index, name=name, dtype=dtype, shape=shape):
            data = np.empty(_size(box := _box(index, shape)), dtype)
            for source, held in pieces[name]:
                _copy(data, box, held, source)
            return data

        out[name] = jax.make_array_from_callback(shape, shardings[name], region)
    return out


def covered(part: BlockSchema, forms: Iterable[BlockSchema]) -> bool:
    """Whether parts of these forms, of the same whole, have everything that is in `part`."""
    marks = {name: np.zeros(shape, bool) for name, _, shape in part.table}
    for form in forms:
        for name, _, box in form.pieces:
            marks[name][_slices(box)] = True
    return all(marks[name][_slices(box)].all() for name, _, box in part.pieces)


def recut(part: BlockSchema, parts: Iterable[tuple[BlockSchema, np.ndarray]]) -> np.ndarray:
    """The bytes of `part`, out of parts (form and bytes) that cover it."""
    return _built(part, _pieces(parts))


# --- boxes ---------------------------------------------------------------------------------------------------------


def _pieces(parts: Iterable[tuple[BlockSchema, np.ndarray]]) -> dict[str, list[tuple[Box, np.ndarray]]]:
    """By name of an array: its boxes that are there, and what is in them."""
    out = {}
    for form, payload in parts:
        start, payload = 0, np.asarray(payload)
        for name, dtype, box in form.pieces:
            end = start + math.prod(_size(box)) * dtype.itemsize
            out.setdefault(name, []).append((box, payload[start:end].view(dtype).reshape(_size(box))))
            start = end
    return out


def _built(part: BlockSchema, held: Mapping[str, list[tuple[Box, np.ndarray]]]) -> np.ndarray:
    out = []
    for name, dtype, box in part.pieces:
        data = np.empty(_size(box), dtype)
        for source, values in held[name]:
            _copy(data, box, values, source)
        out.append(data.reshape(-1).view(np.uint8))
    return np.concatenate(out)


def _copy(target: np.ndarray, box: Box, source: np.ndarray, other: Box) -> None:
    """What is in both boxes, from the array of the other to that of the first."""
    both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, other, strict=True))
    if all(start < end for start, end in both):
        target[_slices(both, box)] = source[_slices(both, other)]


def _joined(boxes: list[Box]) -> list[Box]:
    """The one box that disjoint ones fill, or themselves."""
    around = tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*boxes, strict=True))
    full = math.prod(_size(around)) == sum(math.prod(_size(box)) for box in boxes)
    return [around] if full else boxes


def _box(index: Sequence[slice], shape: Sequence[int]) -> Box:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _size(box: Box) -> tuple[int, ...]:
    return tuple(end - start for start, end in box)


def _slices(box: Box, inside: Box | None = None) -> tuple[slice, ...]:
    """Where a box lies in an array, or in what another box holds of it."""
    starts = [start for start, _ in inside] if inside else [0] * len(box)
    return tuple(slice(start - first, end - first) for (start, end), first in zip(box, starts, strict=True))
