"""The rules that map the tensors of a model type: names and axes in v4jax and in Hugging Face checkpoints.

A rule pairs a flat name and its axis letters with the released name and its axes and, if it differs, with the module
name of transformers. The letters are those of `core/axes.py`; 1 and 3 are axes of that size. The axes of a released
tensor are separated by spaces: "JL Q" means that the axes J and L are merged, followed by Q. A letter in braces inside
a name pins that axis: the checkpoint has one tensor per value of the axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# The role of a tensor decides its dtype (lazy_tensors.py): "f32" tensors are always float32, "norm" scales are never
# narrowed, "index" tensors are integers, and every other tensor is a "matrix".


@dataclass(frozen=True)
class ParamRule:
    """One row of the table.

    Attributes:
        flat: flat name, without the prefix of the layer.
        axes: axis letters of the flat tensor.
        released: released name, without the prefix of the layer.
        released_axes: axes of the released tensor.
        others: further (name, axes) that the reader accepts.
        role: decides the dtype (lazy_tensors.py).
        layers: names of attention, mlp or residual (`LayerSpec`). A layer has this tensor if it has one of these parts;
            () stands for every layer.
    """

    flat: str
    axes: str
    released: str
    released_axes: str
    others: tuple[tuple[str, str], ...] = ()
    role: str = "matrix"
    layers: tuple[str, ...] = ()


class ParamRules(NamedTuple):
    """All rules of a model type.

    Attributes:
        root: tensors outside the layers.
        layer: tensors of a layer.
        mtp: tensors of an MTP layer besides those of the layer inside it.
    """

    root: tuple[ParamRule, ...]
    layer: tuple[ParamRule, ...]
    mtp: tuple[ParamRule, ...]


def same(*names: str, axes: str) -> tuple[tuple[str, str], ...]:
    """Return other names whose tensors have the same axes."""
    return tuple((name, axes) for name in names)
