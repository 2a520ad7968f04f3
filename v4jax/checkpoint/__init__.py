"""Checkpoints on disk: Hugging Face directories, orbax steps of training runs, and the conversion between them."""

import importlib

# No name in this table may equal a module name: importing that module would replace the function of the same name.
_HOMES = {
    "TrainCheckpointer": "orbax",
    "load": "model_io",
    "load_config": "model_io",
    "save": "model_io",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
