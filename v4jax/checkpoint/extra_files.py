"""What a checkpoint holds beside its weights and what v4jax knows of its config: files and fields to hand on.

A Hugging Face directory may hold generation_config.json, chat templates, Python files, licences and a README, and its
config.json fields that v4jax neither reads nor writes. Conversion copies the files and keeps the fields: under the key
"huggingface" of v4jax.json on the way there, in config.json on the way back.
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

_LARGEST = 256 << 20  # bytes of a file that is no weights; tokenizers take up to 40 MB
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
# "checkpoints" is STEPS_NAME of orbax.py, which imports jax; reading Hugging Face files does without.
_WRITTEN_ANEW = ("config.json", directory.CONFIG_NAME, "checkpoints")


@dataclass(frozen=True)
class Companions:
    """files: path below the target -> source. fields: of config.json, None if the checkpoint never had one."""

    files: dict[str, pathlib.Path] = field(default_factory=dict)
    fields: dict[str, object] | None = None

    def copy_to(self, target: pathlib.Path) -> None:
        """Copy all files into a directory. Raises UserError, before any is copied, if one is far too large."""
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
    """The companions of a checkpoint directory of either kind.

    Of one that comes from Hugging Face all files are handed on but weights and hidden files; of a training run, which
    holds metrics and plots too, its tokenizer and generation_config.json. A link is followed only within the
    checkpoint, and within the repository where that is a snapshot in Hugging Face's cache.
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
    """Files that are neither weights nor hidden, folders of links left out."""
    for item in sorted(folder.iterdir()):
        if item.name.startswith(".") or item.name in skipped:
            continue
        if item.is_dir() and not item.is_symlink():
            yield from _walk(item)
        elif item.is_file() and not item.name.endswith(_WEIGHTS):
            yield item
