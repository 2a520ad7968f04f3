"""Files beside the weights of a checkpoint, and config.json fields unknown to v4jax, which a conversion preserves.

A Hugging Face directory may hold generation_config.json, chat templates, Python files, licenses and a README. Its
config.json may have fields that v4jax neither reads nor writes. A conversion copies the files and preserves the fields.
A v4jax directory stores the fields under the key "huggingface" of v4jax.json; a conversion to Hugging Face writes them
to config.json again.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

from v4jax.checkpoint import directory
from v4jax.checkpoint.generation_config import GENERATION_NAME
from v4jax.checkpoint.lazy_tensors import TOKENIZER_NAME, tokenizer_files
from v4jax.core.errors import UserError
from v4jax.models import hf_config

_LARGEST = 256 << 20  # largest size in bytes of a file other than weights; tokenizers have up to 40 MB
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
)
# "checkpoints" repeats STEPS_NAME of step.py, because reading Hugging Face files must not import tensorstore.
_WRITTEN_ANEW = ("config.json", directory.CONFIG_NAME, "checkpoints")


@dataclass(frozen=True)
class Companions:
    """Files and config.json fields that a conversion preserves.

    Attributes:
        files: {path relative to the target: source}.
        fields: fields of config.json; None if the checkpoint never had a config.json.
    """

    files: dict[str, pathlib.Path] = field(default_factory=dict)
    fields: dict[str, object] | None = None

    def copy_to(self, target: pathlib.Path) -> None:
        """Copy all files into a directory. Raises UserError before the first copy if a file exceeds 256 MiB."""
        for source in self.files.values():
            if (size := source.stat().st_size) > _LARGEST:
                raise UserError(
                    f"{source} has {size:,} bytes, and files beside the weights are handed on up to "
                    f"{_LARGEST:,}; move it out of the checkpoint"
                )
        for name, source in self.files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)


def companions_of(source: str | os.PathLike) -> Companions:
    """Return the companions of a checkpoint directory of either format.

    For a directory from Hugging Face, or one converted from it, these are all files except weights and hidden files.
    For a training run, which also holds metrics and plots, these are the tokenizer and generation_config.json. A
    symbolic link is followed only if it points into the checkpoint, or, for a snapshot in Hugging Face's cache, into
    the cached repository.
    """
    source = pathlib.Path(source)
    if directory.format_of(source) == "huggingface":
        return Companions(_all_files(source), hf_config.unknown_fields(hf_config.load_json(source)[0]))
    fields = directory.read_fields(source)
    if fields is not None:
        return Companions(_all_files(source), fields)
    files = tokenizer_files(source) if (source / TOKENIZER_NAME).is_file() else {}
    if (source / GENERATION_NAME).is_file():
        files[GENERATION_NAME] = source / GENERATION_NAME
    return Companions(files)


def _all_files(source: pathlib.Path) -> dict[str, pathlib.Path]:
    root = pathlib.Path(os.path.realpath(source))
    inside = root.parent.parent if root.parent.name == "snapshots" else root
    return {
        str(file.relative_to(source)): file
        for file in _walk(source, _WRITTEN_ANEW)
        if pathlib.Path(os.path.realpath(file)).is_relative_to(inside)
    }


def _walk(folder: pathlib.Path, skipped: tuple[str, ...] = ()) -> Iterator[pathlib.Path]:
    """Yield the files that are neither weights nor hidden. Symbolic links to directories are not followed."""
    for item in sorted(folder.iterdir()):
        if item.name.startswith(".") or item.name in skipped:
            continue
        if item.is_dir() and not item.is_symlink():
            yield from _walk(item)
        elif item.is_file() and not item.name.endswith(_WEIGHTS):
            yield item
