"""Tuned numbers (tile sizes, thresholds) of operations, kept as data: one JSON file an operation.

A file maps "default", a platform ("cpu", "gpu", "tpu") or a device kind ("NVIDIA H200") to numbers by name. The more
specific entry overrides the less specific one, number by number.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from types import MappingProxyType

from v4jax.core.target_device import target_device

_DIRECTORY = pathlib.Path(__file__).parent


def tuned(operation: str, *operands) -> Mapping[str, int]:
    """Return the tuned numbers of an operation by name.

    Args:
        operation: stem of a file of this folder, such as "attention".
        *operands: pytrees of the operation, which decide the device if they are concrete (`core.target_device`).

    Raises:
        FileNotFoundError: no numbers are recorded for the operation.
    """
    device = target_device(*operands)
    return _merged(operation, device.platform, device.device_kind)


@functools.cache
def _merged(operation: str, platform: str, kind: str) -> Mapping[str, int]:
    entries = json.loads((_DIRECTORY / f"{operation}.json").read_text(encoding="utf-8"))
    return MappingProxyType(entries["default"] | entries.get(platform, {}) | entries.get(kind, {}))
