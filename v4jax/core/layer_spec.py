"""What one layer of a model is made of, as data (see `v4jax.config.Model.layers`)."""

from __future__ import annotations

from dataclasses import dataclass

from v4jax.core.errors import ConfigError

# The values that each field of `LayerSpec` may have. `nn/decoder_layer.py` has the classes of attention and mlp.
LAYER_CHOICES = {
    "attention": ("swa", "csa", "hca"),
    "mlp": ("moe", "hash_moe"),
    "residual": ("mhc",),
    "engram": (False,),
}


@dataclass(frozen=True)
class LayerSpec:
    """The parts of one layer, by name.

    Attributes:
        attention: "swa" (sliding window), "csa" (compressed sparse) or "hca" (heavily compressed) attention.
        mlp: "moe" (experts chosen by their scores) or "hash_moe" (experts chosen by the token id); the names are those
            of transformers' `mlp_layer_types`.
        residual: "mhc", manifold-constrained hyper-connections (spec 4).
        engram: whether the layer reads n-gram tables (Engram). No layer of this version does.

    Raises:
        ConfigError: a field has another value than those of `LAYER_CHOICES`.
    """

    attention: str
    mlp: str
    residual: str = "mhc"
    engram: bool = False

    def __post_init__(self):
        for name, known in LAYER_CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"the {name} of a layer is {value!r}; known: {', '.join(map(str, known))}")

    @property
    def parts(self) -> set[str]:
        """The names of attention, mlp and residual."""
        return {self.attention, self.mlp, self.residual}
