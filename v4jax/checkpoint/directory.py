"""The layout of checkpoint directories, and the detection of their format.

A v4jax directory is the workdir of a training run or an exported model:

    v4jax.json                                the full Config; no other file is needed to build the model
    tokenizer.json, tokenizer_config.json     the tokenizer, if the model reads text
    checkpoints/<step>/                       orbax: the parameters, and in a run also the state needed to resume
    generation_config.json, README.md, ...    files of the Hugging Face directory from which it was converted

A Hugging Face directory holds config.json, safetensors files, and a tokenizer under the same names.
"""

from __future__ import annotations

import json
import os
import pathlib
from dataclasses import replace

from v4jax import config as config_lib
from v4jax.checkpoint import checksums
from v4jax.checkpoint.config_versions import CONFIG_VERSION, upgrade_config
from v4jax.config import SOURCES, Config, Data, Mesh, Model, Serve
from v4jax.core.atomic import replace_file, write_error
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path
from v4jax.core.untrusted_json import read_object

CONFIG_NAME = "v4jax.json"
FORMATS = ("huggingface", "orbax")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def format_of(path: str | os.PathLike) -> str:
    """Return "huggingface" or "orbax", judged by the files of the directory. Raises UserError if it is neither."""
    path = local_path(path, "checkpoint")
    known = "give a Hugging Face directory, a v4jax one, or the workdir of a training run"
    if not path.is_dir():
        raise UserError(f"{path} is {'a file' if path.exists() else 'missing'}; {known}")
    if (path / CONFIG_NAME).is_file():
        return "orbax"
    if (path / "config.json").is_file():
        return "huggingface"
    raise UserError(f"{path} is no checkpoint, for it holds neither {CONFIG_NAME} nor config.json; {known}")


def config_text(config: Config, files: dict[str, str], fields: dict | None = None) -> str:
    """Return the content of v4jax.json.

    Args:
        config: the config to store.
        files: {file name: checksum} of the files beside v4jax.json.
        fields: fields of the original config.json to preserve (extra_files.py); None if there was none.
    """
    values = {"format": CONFIG_VERSION, "config": config_lib.to_dict(config), "files": files}
    if fields is not None:
        values["huggingface"] = fields
    return json.dumps(values | {"checksum": checksums.json_digest(values)}, indent=2) + "\n"


def save_config(path: str | os.PathLike, config: Config, tokenizer=None) -> None:
    """Make `path` a v4jax directory. A training run calls this before its first step. Other files are kept.

    Args:
        path: directory, created if it does not exist.
        config: config to write to v4jax.json.
        tokenizer: an object with a method `save(directory)`, such as data.Tokenizer, or None.

    Raises:
        UserError: the directory cannot be written, or the config is not valid.
    """
    path = local_path(path, "workdir")
    config_lib.validate(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save(path)
        files = checksums.of_files(path, _TOKENIZER_FILES)
        replace_file(
            path / CONFIG_NAME, config_text(config, files).encode()
        )  # last, because it makes the path a checkpoint
    except OSError as error:
        raise write_error(path, error, "no checkpoint was touched") from error


def read_config(path: str | os.PathLike) -> Config:
    """Read the config from the v4jax.json of a directory. A config of format version 1 is upgraded.

    Raises:
        UserError: the file is missing, damaged, or of a later format version.
    """
    file = pathlib.Path(path) / CONFIG_NAME
    values = read_object(file)
    _warn_of_changes(file, dict(values))
    version = values.get("format")
    if type(version) is not int or not 1 <= version <= CONFIG_VERSION:
        raise UserError(
            f"{file} has the format {version!r}, this v4jax reads 1 to {CONFIG_VERSION}; use the version that wrote it"
        )
    try:
        return config_lib.validate(config_lib.from_dict(Config, upgrade_config(values["config"], version)))
    except config_lib.ConfigError as error:
        raise UserError(f"{file}: {error}; use the v4jax that wrote it") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{file} holds no config ({error}); restore it from a copy") from error


def read_fields(path: str | os.PathLike) -> dict | None:
    """Return the config.json fields that v4jax.json preserves; None if the weights never were in that format."""
    file = pathlib.Path(path) / CONFIG_NAME
    fields = read_object(file).get("huggingface")
    if fields is not None and not isinstance(fields, dict):
        raise UserError(f"{file}: the field 'huggingface' is no object; restore the file from a copy")
    return fields


def without_paths(config: Config) -> Config:
    """Return a config without paths, which belong to the training machine or may be chosen by a malicious publisher.

    The function resets the disk tier and its directory, the mesh with its sharding rules (which may be a Python file),
    the tokenizer, and the text files of `data`. `data.source` becomes "" if it is not a built-in source or if
    `data.heldout` names files.
    """
    data = config.data
    source = data.source if data.source in SOURCES and not data.heldout else ""
    return replace(
        config,
        data=replace(data, source=source, heldout="", tokenizer=Data.tokenizer),
        cache=replace(config.cache, kv_disk_bytes=0, kv_dir=""),
        mesh=Mesh(),
    )


def _warn_of_changes(file: pathlib.Path, values: dict) -> None:
    checksum = values.pop("checksum", None)
    if checksum is None:  # a v4jax.json written by hand has no checksum
        return
    if checksums.json_digest(values) != checksum:
        checksums.warn_of_change(file)
    else:
        checksums.warn_of_changes(file.parent, values["files"])


def config_of_model(model: Model, name: str) -> Config:
    """Return a validated Config for a model. Other fields get their defaults, adjusted to what the model allows."""
    aligned = -(-Data.seq_len // model.alignment) * model.alignment
    serve = replace(Serve(), max_model_len=min(Serve.max_model_len, model.max_position_embeddings))
    return config_lib.validate(Config(name=name, model=model, data=Data(seq_len=aligned), serve=serve))
