"""The fields of a config.json: checked access, and what all model types read in the same way."""

from __future__ import annotations

import sys

from v4jax.config import Model
from v4jax.core.config_limits import check_values
from v4jax.core.errors import ConfigError, UserError

_MOST = 1e15  # larger integers are mistakes; each field also has a tighter bound of its own


class Fields:
    """The fields of a config.json with checked access. Every error message names the file."""

    def __init__(self, values: dict, source: str):
        self.values, self.source = values, source

    def fail(self, message: str):
        raise UserError(f"{self.source}: {message}")

    def get(self, name: str, default=None):
        value = self.values.get(name)
        if value is None and default is None:
            self.fail(f"the field {name!r} is missing; take the config.json that came with the weights")
        return default if value is None else value

    def integer(self, name: str) -> int:
        value = self.get(name)
        if type(value) is not int or not 1 <= value <= _MOST:
            self.fail(f"{name} is {value!r}, which is no positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        return self.check_number(name, self.get(name, default))

    def check_number(self, name: str, value) -> float:
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            self.fail(f"{name} is {value!r}, which is no positive number")
        return float(value)

    def own(self, name: str, value, known: tuple[str, ...]) -> dict:
        """Return an object that v4jax itself wrote. A field outside `known` is an error: a newer version or a typo."""
        if not isinstance(value, dict):
            self.fail(f"{name} must be an object")
        for key in value:
            if key not in known:
                self.fail(f"unknown field {name}.{key}; known: {', '.join(known)}")
        return value

    def list(self, name: str, length: int, known: tuple) -> list:
        """Return the first `length` entries of a per-layer list, each in `known`. MTP layers follow and are ignored."""
        value = self.values[name]
        if not isinstance(value, list) or len(value) < length:
            self.fail(f"{name} must list one value for each of the {length} layers")
        for item in value[:length]:
            if item not in known:
                self.fail(f"{name} has {item!r}; known: {', '.join(map(str, known))}")
        return value[:length]

    def token(self, name: str, default: int) -> int | None:
        """Return a token id, or None if the field is null. A missing field has transformers' default."""
        value = self.values.get(name, default)
        if value is not None and not _is_token(value):
            self.fail(f"{name} is {value!r:.60}; it must be a token id or null")
        return value

    def tokens(self, name: str, default: int) -> int | tuple[int, ...] | None:
        """Return a token id like `token`, or several as a tuple. A list of one is a token id, an empty list is null."""
        value = self.values.get(name, default)
        if isinstance(value, list) and len(value) != 1:
            if not all(map(_is_token, value)):
                self.fail(f"{name} is {value!r:.60}; it must be a token id, a list of them or null")
            return tuple(value) or None
        value = value[0] if isinstance(value, list) else value
        if value is not None and not _is_token(value):
            self.fail(f"{name} is {value!r:.60}; it must be a token id, a list of them or null")
        return value

    def dtype(self, own: str | None) -> str:
        """Return the dtype of activations. float16 becomes float32, which holds it exactly while bfloat16 does not."""
        name = own or self.values.get("dtype") or self.values.get("torch_dtype") or "bfloat16"
        known = {"bfloat16": "bfloat16", "float32": "float32", "float16": "float32"}
        if not isinstance(name, str) or name not in known:
            self.fail(f"dtype is {name!r}; known: {', '.join(known)}")
        return known[name]

    def checked(self, model: Model) -> Model:
        """Return a model that was made of these fields, if each of its values is in range."""
        try:
            check_values(model, "model.")
        except ConfigError as error:
            self.fail(f"{error} (in v4jax's names)")
        return model


def _is_token(value) -> bool:
    return type(value) is int and value >= 0
