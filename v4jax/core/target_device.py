"""The device that a program is traced for.

It can differ from JAX's default device: `tools/aot.py` compiles for TPUs on a machine without one. A tracer does not
know its device, so a mesh announces its devices while its programs are traced (`parallel.rules.use_rules`).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
from jax.core import Tracer

_TARGET: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar("target_device", default=None)


@contextlib.contextmanager
def use_target_device(device: jax.Device | None) -> Iterator[None]:
    """Make `device` the target of programs that are traced inside the context; None restores JAX's default device."""
    token = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(token)


def target_device(*operands) -> jax.Device:
    """Return the device whose platform and kind decide how an operation is computed.

    Args:
        *operands: pytrees. A concrete array decides, because the operation runs where the array is.

    Returns:
        The device of the first concrete array, else that of the innermost `use_target_device`, else JAX's default
        device.
    """
    for leaf in jax.tree.leaves(operands):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
            return min(leaf.devices(), key=lambda device: device.id)
    if (device := _TARGET.get()) is not None:
        return device
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]  JAX defines it at run time
    if isinstance(default, jax.Device):
        return default
    return jax.devices(default)[0]
