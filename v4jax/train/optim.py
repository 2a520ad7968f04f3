"""Optimizer: Muon for matrices, AdamW for the rest (spec 8.1), and the router-bias rule (spec 3.3)."""

import math

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from v4jax import config

# Logical matrices by the letters of a parameter: inputs, outputs. Letters that are neither (experts, gate or up,
# output groups) count several matrices, each orthogonalised alone. Parameters not listed go to AdamW: embedding and
# head by the report, norms, mHC bases and scales, and (unnamed in it, the only sensible choice) sinks and ape.
MATRICES = {
    "DQ": ("D", "Q"), "QNH": ("Q", "NH"), "DH": ("D", "H"), "GIR": ("I", "R"), "GRD": ("GR", "D"), "DW": ("D", "W"),
    "QJL": ("Q", "JL"), "DJ": ("D", "J"), "MXD": ("XD", "M"), "YXD": ("XD", "Y"), "DE": ("D", "E"),
    "EDUF": ("D", "F"), "EFD": ("F", "D"), "DUF": ("D", "F"), "FD": ("F", "D"), "DO": ("D", "O"),
}  # fmt: skip
_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
_UPDATE_RMS = 0.18


def schedule(train: config.Train, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then a cosine to `final_lr` of it at the last step."""
    warmup = min(train.warmup, max(train.steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(train.steps, warmup + 1), peak * train.final_lr)


def make_optimizer(train: config.Train, letters: dict[str, str]) -> optax.GradientTransformation:
    """Transformation of a flat dict of parameters; `letters` gives each one's axes, a stack axis in front not named."""
    labels = {name: "muon" if axes in MATRICES else "adamw" for name, axes in letters.items()}
    adamw = optax.adamw(schedule(train, train.adam_lr), b1=0.9, b2=0.95, eps=1e-20, weight_decay=train.weight_decay)
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.partition({"muon": _muon(train, letters), "adamw": adamw}, labels),
    )


def _muon(train: config.Train, letters: dict[str, str]) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised by 8 + 2 Newton-Schulz steps, scaled to an RMS of 0.18, decayed."""

    def dimensions(tree):
        return {name: _dimensions(letters[name], leaf) for name, leaf in tree.items()}

    def to_rms(updates, params=None):
        return {name: _scaled(letters[name], leaf) for name, leaf in updates.items()}

    return optax.chain(
        optax.contrib.scale_by_muon(
            ns_coeffs=_NEWTON_SCHULZ,
            ns_steps=len(_NEWTON_SCHULZ),
            beta=train.momentum,
            nesterov=True,
            weight_dimension_numbers=dimensions,
        ),
        optax.stateless(to_rms),
        optax.add_decayed_weights(train.weight_decay),
        optax.scale_by_learning_rate(schedule(train, train.lr)),
    )


def _axes(letters: str, leaf: jax.Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Input and output axes of a (possibly stacked) parameter's matrices."""
    stacked = leaf.ndim - len(letters)
    return tuple(tuple(stacked + letters.index(letter) for letter in side) for side in MATRICES[letters])


def _dimensions(letters: str, leaf):
    return leaf if isinstance(leaf, optax.MaskedNode) else MuonDimensionNumbers(*_axes(letters, leaf))


def _scaled(letters: str, leaf):
    if isinstance(leaf, optax.MaskedNode):
        return leaf
    fan_in, fan_out = (math.prod(leaf.shape[axis] for axis in side) for side in _axes(letters, leaf))
    return leaf * (_UPDATE_RMS * math.sqrt(max(fan_in, fan_out)))


def update_bias(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
    """Router biases after a step: up where an expert got less than the mean load, down where more."""
    return bias_E + rate * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)
