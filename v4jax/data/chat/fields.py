"""Reader of the fields of an API request. Every complaint is one line that names the path of the field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from v4jax.core.errors import UserError, suggest

Value = TypeVar("Value")
_REQUIRED = object()
_NAMES = {str: "text", bool: "true or false", dict: "an object", list: "a list"}


def get(source: dict, name: str, kind: type[Value], where: str, default: object = _REQUIRED) -> Value:
    """Return a field of an object.

    Args:
        source: object of the request.
        name: name of the field.
        kind: str, bool, dict or list.
        where: path of the object, for messages; "" for the request itself.
        default: value of an absent or null field. Without it the field is required.

    Raises:
        UserError: the field is required and absent, or has another type.
    """
    value = source.get(name)
    path = f"{where}.{name}" if where else name
    if value is None:
        if default is _REQUIRED:
            raise UserError(f"{path} is missing; it must be {_NAMES[kind]}")
        return default
    if not isinstance(value, kind):
        raise UserError(f"{path} is {_type(value)}; it must be {_NAMES[kind]}")
    return value


def choice(source: dict, name: str, options: Sequence[str], where: str, default: object = _REQUIRED) -> str:
    """Return a text field that has one of the values `options`; otherwise like `get`."""
    value = get(source, name, str, where, default)
    if value is not default and value not in options:
        path = f"{where}.{name}" if where else name
        raise UserError(f"{path} is {value!r}; {suggest(value, options)}")
    return value


def objects(source: dict, name: str, where: str = "", default: object = _REQUIRED) -> list[tuple[str, dict]]:
    """Return (path, object) of the items of a list of objects; otherwise like `get`."""
    items = get(source, name, list, where, default)
    path = f"{where}.{name}" if where else name
    for i, item in enumerate(items or ()):
        if not isinstance(item, dict):
            raise UserError(f"{path}[{i}] is {_type(item)}; it must be an object")
    return [(f"{path}[{i}]", item) for i, item in enumerate(items or ())]


def _type(value: object) -> str:
    return "null" if value is None else _NAMES.get(type(value), "a number")


def text_content(source: dict, name: str, where: str, types: Sequence[str], default: object = _REQUIRED) -> str:
    """Return content that is text or a list of text blocks. The texts of blocks are joined by empty lines.

    Args:
        source, name, where, default: as in `get`.
        types: values of `type` of a text block. Blocks of other types, such as images, are refused.
    """
    content = source.get(name)
    if isinstance(content, str) or (content is None and default is not _REQUIRED):
        return default if content is None else content
    path = f"{where}.{name}" if where else name
    if not isinstance(content, list):
        raise UserError(f"{path} is {_type(content)}; it must be text or a list of text blocks")
    blocks = objects(source, name, where)
    for block_path, block in blocks:
        kind = get(block, "type", str, block_path)
        if kind not in types:
            raise UserError(f"{block_path}.type is {kind!r}; this model reads text blocks ({', '.join(types)}) only")
    return "\n\n".join(get(block, "text", str, block_path) for block_path, block in blocks)
