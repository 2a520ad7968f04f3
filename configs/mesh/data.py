"""Every device holds the whole model and its own rows of the batch: for models that fit one device."""

from v4jax.config import Layout


def get_layout() -> Layout:
    """The rule table."""
    return Layout("data", fill="data", activations=(("batch", ("slice", "data")),))
