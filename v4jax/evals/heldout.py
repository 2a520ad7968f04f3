"""Which held-out text a checkpoint is scored on: the embedded corpus, or files that the user names."""

from __future__ import annotations

import dataclasses

from v4jax import checkpoint as store
from v4jax import config as configs
from v4jax.checkpoint import directory
from v4jax.core.errors import UserError


def config_of(checkpoint: str, data: str = "", heldout: str = "") -> configs.Config:
    """The checkpoint's config, with `data` as data.source and `heldout` as data.heldout where they are given.

    Raises UserError if the checkpoint was trained on files and none are given: a path stored in a checkpoint, which may
    come from anybody, is not read unasked.
    """
    config = store.load_config(checkpoint)
    if data or heldout:
        source = data or config.data.source or configs.Data.source
        return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source, heldout=heldout))
    if not config.data.source:
        stored = directory.read_config(checkpoint).data
        flags = [f"--data={stored.source}"] if stored.source not in configs.SOURCES else []
        flags += [f"--heldout={stored.heldout}"] if stored.heldout else []
        raise UserError(
            f"{checkpoint} was trained on files, and paths stored in a checkpoint are not read unasked; "
            f"name the text, such as {' '.join(flags)}"
        )
    return config
