"""Hugging Face `deepseek_v4` directories: conversion between config.json and safetensors, and Model and flat tensors.

The writer uses the released names (spec 9.1), which transformers converts while loading. The reader accepts the
released names, the files of transformers' save_pretrained, and plain dumps of its modules. FP8 weights with block
scales and packed FP4 experts are dequantized. The dtype of a tensor follows from its role (lazy_tensors.py).
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np

from v4jax.checkpoint import checksums, param_mapping
from v4jax.checkpoint.extra_files import Companions
from v4jax.checkpoint.lazy_tensors import FLOAT32, LazyTensors, described, memory_dtype, report, tokenizer_files
from v4jax.checkpoint.safetensors import INDEX_NAME, Entry, SafetensorsDir, write_safetensors
from v4jax.config import Model
from v4jax.core import dtypes
from v4jax.core.atomic import replace_directory, write_text
from v4jax.core.errors import UserError
from v4jax.models import hf_config

_FLOATS = ("F32", "BF16", "F16", "F64")
# code -> (unsigned type of the same width, bit mask). Exactly the infinities and NaNs have every bit of the mask set.
_SPECIAL = {
    "F8_E8M0": (np.uint8, 0xFF),
    "F8_E4M3": (np.uint8, 0x7F),
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
}
_PIECE = 1 << 20  # elements checked for NaN at a time, so that the temporaries stay in the cache of a core
_MAX_MISSING = 10_000  # missing tensors after which the search ends
_MAX_PIECES = 64  # pieces of a tensor that are looked up to determine its spelling
_FP4_GROUP = 32  # input elements per scale of a packed expert (spec 9.1)


def read_hf(path: str | os.PathLike, dtype=None, verify: bool = True) -> tuple[Model, HfTensors]:
    """Open a Hugging Face directory. All names and shapes are checked before any data is read.

    Args:
        path: directory with config.json and safetensors files.
        dtype: "float32" or "bfloat16" for the matrices; None keeps the stored dtype, except that float16 becomes
            float32, and FP8 and FP4 become bfloat16. Both conversions are exact.
        verify: compare tensors with the checksums that `write_hf` stores; files written by other programs have none.

    Returns:
        The model config, and the tensors as a lazy mapping by flat name. If the directory has no MTP tensors, the
        config has num_nextn_predict_layers=0.

    Raises:
        UserError: the directory is missing or damaged, or its tensors do not fit its config.json.
    """
    values, source = hf_config.load_json(path)
    model = hf_config.from_hf(values, source)
    store = SafetensorsDir(path, verify)
    if verify:
        checksums.warn_of_changes(store.path, store.file_digests())
    if not _has_mtp(store):
        model = replace(model, num_nextn_predict_layers=0)
    return model, HfTensors(
        store, model, _block_size(values, source), None if dtype is None else dtypes.weight_dtype(dtype)
    )


class HfTensors(LazyTensors):
    """Tensors of a Hugging Face directory by flat name, as `read_hf` returns them.

    Every access reads and converts the tensor again; nothing is cached.
    """

    def __init__(self, store: SafetensorsDir, model: Model, block: tuple[int, int], dtype: np.dtype | None):
        super().__init__(param_mapping.tensors(model))
        self._store, self._model, self._dtype = store, model, dtype
        self._block = block
        self._spelling = _match(store, model, self._tensors, block)

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of `read(name)` without reading the tensor."""
        tensor = self._tensors[name]
        stored = self._store.dtype(tensor.first(self._spelling[name]))
        return memory_dtype(tensor.role, stored, self._dtype)

    def read(self, name: str, leading: int | slice = slice(None)) -> np.ndarray:
        """Read a flat tensor, or `tensor[leading]`.

        If the experts are stored as separate tensors, only those of the slice are read. Memory holds one expert beside
        the result.
        """
        tensor, dtype = self._tensors[name], self.dtype(name)
        rows = range(tensor.shape[0])[leading]
        single = isinstance(rows, int)
        rows = range(rows, rows + 1) if single else rows
        pieces = list(tensor.pieces(self._spelling[name]))
        if len(pieces) > 1 and isinstance(pieces[0].index[0], int):
            out = np.empty((len(rows), *tensor.shape[1:]), dtype)
            for piece in pieces:
                if piece.index[0] in rows:
                    moved = replace(piece, index=(rows.index(piece.index[0]), *piece.index[1:]))
                    moved.put(out, self._piece(tensor, piece, dtype))
            return out[0] if single else out
        out = np.empty(tensor.shape, dtype)
        for piece in pieces:
            piece.put(out, self._piece(tensor, piece, dtype))
        return out[leading]

    def _piece(self, tensor: param_mapping.ParamInfo, piece: param_mapping.TensorPiece, dtype: np.dtype) -> np.ndarray:
        """Read one checkpoint tensor, dequantized and cast to `dtype`, of shape `piece.shape`."""
        info = self._store.info(piece.name)
        array = self._store.read(piece.name)
        if tensor.role == "index":
            return _expert_ids(array, self._model.moe.n_routed_experts, info)
        if info.code in _FLOATS:
            _check_finite(array, piece.name, info)
            return array.astype(dtype, copy=False)
        name = _scale_name(self._store, piece.name)
        scale = self._store.read(name)
        _check_finite(scale, name, self._store.info(name))
        if info.code == "F8_E4M3":
            _check_finite(array, piece.name, info)
            return dequantize_fp8(array, scale.astype(FLOAT32), self._block).astype(dtype)
        return dequantize_fp4(array, scale.astype(FLOAT32)).astype(dtype)


def write_hf(
    path: str | os.PathLike,
    model: Model,
    flat: Mapping[str, np.ndarray],
    tokenizer_dir: str | os.PathLike | None = None,
    dtype=None,
    max_shard_bytes: int = 5 * 10**9,
    companions: Companions | None = None,
    replace_all: bool = False,
) -> None:
    """Write a Hugging Face directory that transformers' from_pretrained loads. On failure the target is unchanged.

    Args:
        path: target directory.
        model: config of the model.
        flat: arrays (numpy, jax or lazy) by flat name, exactly those of `model`. They are fetched one at a time; all
            routed experts of a layer form one array.
        tokenizer_dir: directory whose tokenizer files are copied, or one tokenizer.json, or None.
        dtype: dtype of the matrices; None keeps the dtype of each array.
        max_shard_bytes: largest size of a safetensors file in bytes; a larger tensor gets a file of its own.
        companions: further files to copy, and further fields for config.json.
        replace_all: delete every old file of the target. False keeps files that are not written, such as a README.

    Raises:
        UserError: tensors are missing, unexpected or of the wrong shape or dtype, the disk is full, or the target is
            not a model directory.
    """
    wanted = None if dtype is None else dtypes.weight_dtype(dtype)
    known = described(model, flat, path)
    fetch = functools.lru_cache(maxsize=1)(lambda name: np.asarray(flat[name]))
    entries = []
    for name, (tensor, given) in known.items():
        stored = _file_dtype(tensor, given, wanted)
        entries += [Entry(p.name, stored, p.shape, _loader(fetch, name, p, stored)) for p in tensor.pieces()]
    table_dtype = _file_dtype(*known["embed.table"], wanted)
    companions = companions or Companions()
    config = (companions.fields or {}) | hf_config.to_hf(model, table_dtype.name)
    copies = tokenizer_files(tokenizer_dir)
    with replace_directory(path, "config.json", lambda name: replace_all or _is_weights(name)) as directory:
        for target, source in copies.items():
            shutil.copyfile(source, directory / target)
        companions.copy_to(directory)
        write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
        files = sorted(file.name for file in directory.iterdir())
        write_safetensors(directory, entries, max_shard_bytes, checksums.of_files(directory, files))


# --- quantized weights -------------------------------------------------------------------------------------------


def dequantize_fp8(values: np.ndarray, scale: np.ndarray, block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """Dequantize an FP8 weight by multiplying each block of `block` elements with its scale (spec 9.1).

    Args:
        values: float8_e4m3fn [out, in].
        scale: float32 [ceil(out / block[0]), ceil(in / block[1])], multipliers.
        block: rows and columns of a block.

    Returns:
        float32 [out, in].
    """
    out = np.take(_fp8_table(), values.view(np.uint8))
    wide = np.repeat(scale, min(block[1], out.shape[1]), axis=1)[:, : out.shape[1]]
    for row in range(scale.shape[0]):
        out[row * block[0] : (row + 1) * block[0]] *= wide[row]
    return out


def dequantize_fp4(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Dequantize an FP4 (E2M1) weight by multiplying each group of 32 inputs with its scale (spec 9.1).

    Args:
        packed: int8 [out, in / 2], low nibble first, or float4_e2m1fn [out, in].
        scale: float32 [out, in / 32], multipliers.

    Returns:
        float32 [out, in].
    """
    values = (packed if packed.dtype == ml_dtypes.float4_e2m1fn else dtypes.unpack_f4(packed)).astype(FLOAT32)
    out = values.reshape(values.shape[0], -1, _FP4_GROUP)
    out *= scale[..., None]
    return out.reshape(values.shape)


@functools.cache
def _fp8_table() -> np.ndarray:
    """Return the float32 value of each of the 256 E4M3 codes. A table lookup is faster than a conversion."""
    return np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(FLOAT32)


def _scale_name(store: SafetensorsDir, weight: str) -> str | None:
    """Return the name of a quantized weight's scale, or None. `weight_scale_inv` is a multiplier, despite its name."""
    stem = weight.removesuffix("weight")
    return next((stem + name for name in ("scale", "weight_scale_inv") if stem + name in store), None)


def _block_size(values: dict, source: str) -> tuple[int, int]:
    quantization = values.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    block = [128, 128] if block is None else block
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise UserError(f"{source}: weight_block_size is {block!r}; it must be two positive integers")
    return block[0], block[1]


# --- matching a checkpoint with a model --------------------------------------------------------------------------


def _has_mtp(store: SafetensorsDir) -> bool:
    names = [name for name in store.names() if _is_draft(name) and not param_mapping.IGNORED.fullmatch(name)]
    return bool(names) and not any(param_mapping.FOREIGN_DRAFT.fullmatch(name) for name in names)


def _is_draft(name: str) -> bool:
    return name.removeprefix("model.").startswith("mtp.")


def _later_draft(name: str) -> bool:
    """Return whether a draft tensor belongs to a draft layer after the first; such layers are not read."""
    return not name.removeprefix("model.").startswith("mtp.0.")


def _match(store: SafetensorsDir, model: Model, tensors: dict, block: tuple[int, int]) -> dict[str, int]:
    """Return the number of the spelling that each flat tensor uses in the checkpoint.

    Raises:
        UserError: tensors are missing, unexpected, or of the wrong shape or type; one message covers all of them.
    """
    spelling, used = {}, set()
    missing, wrong = [], []
    for tensor in tensors.values():
        if len(missing) > _MAX_MISSING:  # config.json may name any number of experts
            break
        found = _spelling_of(store, tensor)
        if found is None:
            missing.append(tensor.first(0))
            continue
        spelling[tensor.name] = found
        for piece in tensor.pieces(found):
            if piece.name not in store:
                missing.append(piece.name)
                if len(missing) > _MAX_MISSING:
                    break
                continue
            used.add(piece.name)
            problem = _check_piece(store, tensor, piece, block)
            if problem:
                wrong.append(f"{piece.name} {problem}")
            elif store.info(piece.name).code not in _FLOATS:
                used.add(_scale_name(store, piece.name))
    drafts = model.num_nextn_predict_layers > 0
    unexpected = [
        name
        for name in store.names()
        if name not in used
        and not param_mapping.IGNORED.fullmatch(name)
        and not (_is_draft(name) and (not drafts or _later_draft(name)))
    ]
    report(
        f"{store.path} does not fit its config.json",
        missing,
        unexpected,
        wrong,
        "check that all files are of one model and complete",
    )
    return spelling


def _spelling_of(store: SafetensorsDir, tensor: param_mapping.ParamInfo) -> int | None:
    """Return the spelling that a checkpoint uses for a tensor, or None.

    The first piece decides; if it is missing in every spelling, one of the first `_MAX_PIECES` pieces decides.
    """
    known = range(tensor.spellings)
    found = next((s for s in known if tensor.first(s) in store), None)
    if found is not None:
        return found
    some = lambda s: itertools.islice(tensor.pieces(s), _MAX_PIECES)
    return next((s for s in known if any(piece.name in store for piece in some(s))), None)


def _check_piece(
    store: SafetensorsDir, tensor: param_mapping.ParamInfo, piece: param_mapping.TensorPiece, block: tuple[int, int]
) -> str:
    """Return the problem with the stored shape, type or scale of a piece, or "" if there is none."""
    info = store.info(piece.name)
    if tensor.role == "index":
        good = info.code in ("I64", "I32")
        return _shape_problem(info.shape, piece.shape) if good else f"is {info.code} instead of an integer type"
    if info.code in _FLOATS:
        return _shape_problem(info.shape, piece.shape)
    expert = tensor.name.split(".")[-2] == "experts"
    if (
        tensor.role != "matrix"
        or len(piece.shape) != 2
        or info.code not in ("F8_E4M3", *(("I8", "F4") if expert else ()))
    ):
        return f"is {info.code}, which cannot be read here"
    rows, columns = piece.shape
    packed = (rows, columns // 2) if info.code == "I8" else piece.shape
    scale_shape = (
        (-(-rows // block[0]), -(-columns // block[1])) if info.code == "F8_E4M3" else (rows, columns // _FP4_GROUP)
    )
    scale = _scale_name(store, piece.name)
    if scale is None:
        return f"is {info.code} without a scale beside it"
    if store.info(scale).code not in ("F8_E8M0", "F32"):
        return f"has a scale of type {store.info(scale).code} instead of F8_E8M0 or F32"
    problem = _shape_problem(store.shape(scale), scale_shape)
    return _shape_problem(info.shape, packed) or (f"has a scale that {problem}" if problem else "")


def _shape_problem(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    return "" if found == wanted else f"has shape {list(found)} instead of {list(wanted)}"


def _check_finite(array: np.ndarray, name: str, info) -> None:
    """Raise UserError if a tensor contains an infinity or a NaN, such as the byte 255 of an E8M0 scale.

    For the narrow types the bit patterns are compared, because their own isfinite is slow.
    """
    flat = array.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        part = flat[start : start + _PIECE]
        if info.code in _SPECIAL:
            kind, mask = _SPECIAL[info.code]
            exponents = part.view(kind) & kind(mask)
            damaged = exponents.max() == mask
        else:
            damaged = not np.isfinite(part).all()
        if damaged:
            at = start + int(np.isfinite(part.astype(np.float64)).argmin())
            raise UserError(
                f"{info.file}: {name} is damaged, its element {[int(i) for i in np.unravel_index(at, array.shape)]} is "
                f"{flat[at]!s}; copy or download the file again"
            )


def _expert_ids(table: np.ndarray, experts: int, info) -> np.ndarray:
    unknown = table[(table < 0) | (table >= experts)]
    if unknown.size:
        raise UserError(
            f"{info.file}: the hash table names expert {unknown[0]}, but the model has {experts}; "
            "check that config.json and weights belong together"
        )
    return table.astype(np.int32)


# --- writing -----------------------------------------------------------------------------------------------------


def _file_dtype(tensor: param_mapping.ParamInfo, given: np.dtype, wanted: np.dtype | None) -> np.dtype:
    return np.dtype(np.int64) if tensor.role == "index" else memory_dtype(tensor.role, given, wanted)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") or name == INDEX_NAME


def _loader(fetch: Callable, name: str, piece: param_mapping.TensorPiece, stored: np.dtype) -> Callable[[], np.ndarray]:
    return lambda: piece.to_hf(fetch(name)).astype(stored, copy=False)
