"""Checkpoints on disk: Hugging Face directories, orbax steps of training runs, and the way between them."""

import importlib

# No name here is also a module's: importing a module would replace the function of its name.
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
