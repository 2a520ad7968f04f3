"""A lazy mapping from flat names to the tensors of a model, and the rules that all checkpoint formats share.

The role of a tensor (param_mapping.py) decides its dtype. An "f32" tensor is always float32. A "norm" scale is widened
to the requested dtype but never narrowed. An "index" tensor is int32 in memory and int64 in Hugging Face files. A
"matrix" has the requested dtype.
"""

from __future__ import annotations

import abc
import os
import pathlib
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from v4jax.checkpoint import param_mapping
from v4jax.config import Model
from v4jax.core import dtypes
from v4jax.core.errors import UserError

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
TOKENIZER_NAME = "tokenizer.json"
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


class LazyTensors(Mapping[str, np.ndarray]):
    """A mapping from flat names to arrays that reads an array at each access and caches nothing.

    Args:
        known: the tensors of the model by flat name.
    """

    def __init__(self, known: Mapping[str, param_mapping.ParamInfo]):
        self._tensors = known

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a flat tensor without reading it."""
        return self._tensors[name].shape

    @abc.abstractmethod
    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of `read(name)` without reading the tensor."""

    @abc.abstractmethod
    def read(self, name: str, leading: int | slice = slice(None)) -> np.ndarray:
        """Read a flat tensor, or `tensor[leading]`, where `leading` indexes the first axis."""


def memory_dtype(role: str, stored: np.dtype, wanted: np.dtype | None) -> np.dtype:
    """Return the dtype of a tensor in memory.

    Args:
        role: role of the tensor (param_mapping.py).
        stored: dtype in the checkpoint.
        wanted: requested dtype; None keeps the stored one, except that 1-byte types become bfloat16, and other types
            than bfloat16 and float32 become float32.
    """
    if role == "index":
        return np.dtype(np.int32)
    if role == "f32":
        return FLOAT32
    natural = stored if stored in (BFLOAT16, FLOAT32) else BFLOAT16 if stored.itemsize == 1 else FLOAT32
    if role == "norm" and natural == FLOAT32:
        return FLOAT32
    return wanted or natural


def described(
    model: Model, flat: Mapping, path: str | os.PathLike
) -> dict[str, tuple[param_mapping.ParamInfo, np.dtype]]:
    """Pair every tensor of `model` with its dtype in `flat`, without reading lazy tensors.

    Args:
        model: config of the model.
        flat: arrays (numpy, jax or lazy) by flat name.
        path: target directory, for the error message.

    Returns:
        {flat name: (tensor, dtype)}.

    Raises:
        UserError: the names or shapes are not exactly those of the model, or weights cannot have the dtype.
    """
    tensors = param_mapping.tensors(model)
    lazy = isinstance(flat, LazyTensors)
    shapes = {name: tuple(flat.shape(name) if lazy else flat[name].shape) for name in flat}
    report(
        f"cannot write {path}",
        missing=[name for name in tensors if name not in shapes],
        unexpected=[name for name in shapes if name not in tensors],
        wrong=[
            f"{name} {list(shapes[name])} instead of {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in shapes and shapes[name] != tensor.shape
        ],
        cure="pass the tensors of this very model",
    )
    result = {}
    for name, tensor in tensors.items():
        dtype = np.dtype(flat.dtype(name) if lazy else flat[name].dtype)
        if tensor.role != "index":
            dtypes.weight_dtype(dtype)
        elif dtype.kind not in "iu":
            raise UserError(f"{name} is {dtype.name}; expert numbers must be integers")
        result[name] = tensor, dtype
    return result


def report(what: str, missing: list[str], unexpected: list[str], wrong: list[str], cure: str) -> None:
    """Raise one UserError that names the first three tensors of each list. Return if all lists are empty."""
    parts = []
    for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{label}: {', '.join(names[:3])}{more}")
    if parts:
        raise UserError(f"{what}: {'; '.join(parts)}; {cure}")


def tokenizer_files(source: str | os.PathLike | None) -> dict[str, pathlib.Path]:
    """Return {target name: source} for the files of a tokenizer.

    Args:
        source: directory of the tokenizer, or its tokenizer.json, or None for no files.

    Raises:
        UserError: the directory has no tokenizer files.
    """
    if source is None:
        return {}
    source = pathlib.Path(source)
    if source.is_file():
        return {TOKENIZER_NAME: source}
    found = {file.name: file for pattern in _TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()}
    if not found:
        raise UserError(f"{source} has no {TOKENIZER_NAME}; give a directory that holds a tokenizer, or none")
    return found
