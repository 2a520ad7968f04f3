"""Frozen dataclasses that JAX transforms as pytrees."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import dataclass_transform

import jax


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def pytree(cls):
    """Register `cls` as a frozen dataclass and as a pytree.

    Fields with `metadata={"static": True}` belong to the tree's structure, so jit compiles once per value. All other
    fields are children.
    """
    cls = dataclass(frozen=True)(cls)
    static = [field.name for field in dataclasses.fields(cls) if field.metadata.get("static")]
    dynamic = [field.name for field in dataclasses.fields(cls) if field.name not in static]
    return jax.tree_util.register_dataclass(cls, dynamic, static)
