"""The held-out text of an eval: from the embedded corpus, or from files that the user names."""

from __future__ import annotations

import dataclasses

from v4jax import checkpoint as store
from v4jax import config as configs
from v4jax.checkpoint import directory
from v4jax.core.errors import UserError


def config_of(checkpoint: str, data: str = "", heldout: str = "") -> configs.Config:
    """Read a checkpoint's config and select its held-out text.

    Args:
      checkpoint: Directory of the checkpoint.
      data: data.source of the result; empty keeps the checkpoint's.
      heldout: data.heldout of the result.

    Raises:
      UserError: The checkpoint was trained on files, and neither `data` nor `heldout` is given. A path stored in a
        checkpoint is not followed, because the checkpoint may be of unknown origin.
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
