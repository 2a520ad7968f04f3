"""Every device holds the whole model and its own rows of the batch: for models that fit one device."""

from v4jax.config import ShardingRules


def get_sharding() -> ShardingRules:
    """The rule table."""
    return ShardingRules("data", fill="data", activations=(("batch", ("slice", "data")),))
