"""What a checkpoint directory holds, and which kind it is.

A v4jax directory, be it the workdir of a training run or an exported model:

    v4jax.json                                the whole Config, so that a model is rebuilt with no other file
    tokenizer.json, tokenizer_config.json     where text is asked for
    checkpoints/<step>/                       orbax: parameters, and of a run also what resuming needs
    generation_config.json, README.md, ...    files of the Hugging Face directory that it was converted from

A Hugging Face directory holds config.json, safetensors and a tokenizer under the same names.
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
from v4jax.core.atomic import replace_text, write_error
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path
from v4jax.core.untrusted_json import read_object

CONFIG_NAME = "v4jax.json"
FORMATS = ("huggingface", "orbax")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def format_of(path: str | os.PathLike) -> str:
    """ "huggingface" or "orbax", by what the directory holds. Raises UserError if it is neither."""
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
    """Content of v4jax.json.

    files: checksums by name of the files beside it. fields: of a config.json, to be handed on (see extra_files.py).
    """
    values = {"format": CONFIG_VERSION, "config": config_lib.to_dict(config), "files": files}
    if fields is not None:
        values["huggingface"] = fields
    return json.dumps(values | {"checksum": checksums.json_digest(values)}, indent=2) + "\n"


def save_config(path: str | os.PathLike, config: Config, tokenizer=None) -> None:
    """Make `path` a v4jax directory, as a training run does before its first step; what it holds is kept.

    tokenizer: anything with `save(directory)`, such as data.Tokenizer. Raises UserError if nothing can be written, or
    the config is not valid.
    """
    path = local_path(path, "workdir")
    config_lib.validate(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save(path)
        files = checksums.of_files(path, _TOKENIZER_FILES)
        replace_text(path / CONFIG_NAME, config_text(config, files))  # last, for it makes the directory a checkpoint
    except OSError as error:
        raise write_error(path, error, "no checkpoint was touched") from error


def read_config(path: str | os.PathLike) -> Config:
    """Config in the v4jax.json of a directory; one of version 1 is upgraded.

    Raises UserError for a damaged file or a later version.
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
    """The fields of a config.json that v4jax.json hands on; None if the checkpoint never was a Hugging Face one."""
    file = pathlib.Path(path) / CONFIG_NAME
    fields = read_object(file).get("huggingface")
    if fields is not None and not isinstance(fields, dict):
        raise UserError(f"{file}: the field 'huggingface' is no object; restore the file from a copy")
    return fields


def without_paths(config: Config) -> Config:
    """A config without the paths in it: they are for who trained, and may have been chosen by who published.

    Dropped are the disk tier and its directory, the mesh layout (which may be a Python file), a tokenizer elsewhere,
    and files of text; `data.source` is then "".
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
    if checksum is None:  # written by hand
        return
    if checksums.json_digest(values) != checksum:
        checksums.warn_of_change(file)
    else:
        checksums.warn_of_changes(file.parent, values["files"])


def config_of_model(model: Model, name: str) -> Config:
    """A validated Config around a bare model, its other parts at their defaults or what the model allows."""
    aligned = -(-Data.seq_len // model.alignment) * model.alignment
    serve = replace(Serve(), max_model_len=min(Serve.max_model_len, model.max_position_embeddings))
    return config_lib.validate(Config(name=name, model=model, data=Data(seq_len=aligned), serve=serve))
