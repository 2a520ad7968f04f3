"""Conversion between Hugging Face's config.json and `v4jax.config.Model`, for each model type in `MODEL_TYPES`."""

from __future__ import annotations

import os
import pathlib
import types
from typing import NamedTuple

from v4jax.config import Model
from v4jax.core import untrusted_json
from v4jax.core.errors import UserError
from v4jax.models.hf import deepseek_v4, deepseek_v4_params
from v4jax.models.hf.fields import Fields
from v4jax.models.hf.param_rules import ParamRules


class ModelType(NamedTuple):
    """The format of one model_type.

    Attributes:
        config: a module with `read(fields)`, `write(model, weights_dtype)`, the fields that `write` replaces by others
            (REPLACED) and the kinds of attention that the format describes (ATTENTION).
        params: the names and axes of its tensors.
    """

    config: types.ModuleType
    params: ParamRules


MODEL_TYPES = {"deepseek_v4": ModelType(deepseek_v4, deepseek_v4_params.RULES)}


def read(path: str | os.PathLike) -> Model:
    """Read the model config from a config.json or its directory.

    Raises:
        UserError: the file is missing or is not a valid config of a known model type.
    """
    return from_hf(*load_json(path))


def load_json(path: str | os.PathLike) -> tuple[dict, str]:
    """Load a config.json, given the file or its directory.

    Returns:
        The raw fields, and the path for error messages.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    path = pathlib.Path(path)
    path = path / "config.json" if path.is_dir() or path.suffix != ".json" else path
    if not os.path.lexists(path):
        raise UserError(f"{path} does not exist; give a Hugging Face model directory")
    return untrusted_json.read_object(path), str(path)


def from_hf(values: dict, source: str = "config.json") -> Model:
    """Convert the fields of a config.json to a Model.

    Each field is checked against its range. Most relations between fields are not checked; the caller does that with
    `v4jax.config.validate` before it runs the model.

    Args:
        values: the fields.
        source: name of the file in error messages.

    Raises:
        UserError: a field is invalid. The message names `source`, the field and the cure.
    """
    fields, found = Fields(values, source), values.get("model_type")
    if not isinstance(found, str) or found not in MODEL_TYPES:
        known = ", ".join(map(repr, MODEL_TYPES))
        fields.fail(f"model_type is {found!r}; v4jax reads {known} only (V3 and V4.1 are other architectures)")
    return MODEL_TYPES[found].config.read(fields)


def to_hf(model: Model, weights_dtype: str | None = None) -> dict:
    """Convert a Model to the fields of a config.json from which transformers builds the same model.

    Args:
        model: the model config.
        weights_dtype: dtype of the stored weights ("float32", "bfloat16"). None means model.dtype.

    Raises:
        UserError: the format cannot describe this model.
    """
    return model_type(model).config.write(model, weights_dtype)


def model_type(model: Model) -> ModelType:
    """Return the format that describes a model."""
    kinds = {layer.attention for layer in model.layers}
    return next(format for format in MODEL_TYPES.values() if kinds <= format.config.ATTENTION)


def unknown_fields(values: dict) -> dict:
    """Return the fields of a config.json that v4jax neither reads nor writes, so that a conversion can copy them."""
    written, replaced = to_hf(from_hf(values)), MODEL_TYPES[values["model_type"]].config.REPLACED
    return {name: value for name, value in values.items() if name not in written and name not in replaced}
