"""Optimizer: Muon for matrices, AdamW for the rest (spec 8.1), and the router-bias rule (spec 3.3)."""

import math
from collections import defaultdict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from v4jax import config
from v4jax.parallel.matrix_exchange import map_whole_matrices
from v4jax.parallel.rules import current_rules

# Axis letters of a parameter -> (input axes, output axes) of its matrices. All other axes (experts, gate or up, output
# groups) enumerate matrices, and each matrix is orthogonalized separately. Parameters that are not listed use AdamW:
# so does the technical report for embedding, head, norms, and mHC bases and scales. It does not name attention sinks
# and `ape`; they are no matrices of a linear map, so they use AdamW as well.
MATRICES = {
    "DQ": ("D", "Q"),
    "QNH": ("Q", "NH"),
    "DH": ("D", "H"),
    "GIR": ("I", "R"),
    "GRD": ("GR", "D"),
    "DW": ("D", "W"),
    "QJL": ("Q", "JL"),
    "DJ": ("D", "J"),
    "MXD": ("DX", "M"),
    "YXD": ("DX", "Y"),
    "DE": ("D", "E"),
    "EUDF": ("D", "F"),
    "EFD": ("F", "D"),
    "DUF": ("D", "F"),
    "FD": ("F", "D"),
    "DO": ("D", "O"),
}
_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
NEWTON_SCHULZ_STEPS = len(_NEWTON_SCHULZ)
_UPDATE_RMS = 0.18


def schedule(train: config.Train, peak: float) -> optax.Schedule:
    """Learning-rate schedule: linear warm-up from 0 to `peak`, then a cosine decay to `train.final_lr * peak`.

    The warm-up takes `train.warmup` steps, and the decay ends at step `train.steps`.
    """
    warmup = min(train.warmup, max(train.steps - 1, 0))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(train.steps, warmup + 1), peak * train.final_lr)


def make_optimizer(train: config.Train, letters: dict[str, str]) -> optax.GradientTransformation:
    """The optimizer: clipping by global norm, then Muon for matrices and AdamW for all other parameters.

    Args:
      train: Learning rates, momentum, weight decay and clipping.
      letters: Axis letters of each parameter by its flat name. A leading stack axis has no letter.

    Returns:
      A transformation of a flat dict of parameters.
    """
    labels = {name: "muon" if axes in MATRICES else "adamw" for name, axes in letters.items()}
    adamw = optax.adamw(schedule(train, train.adam_lr), b1=0.9, b2=0.95, eps=1e-20, weight_decay=train.weight_decay)
    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.partition({"muon": _muon(train, letters), "adamw": adamw}, labels),
    )


def _muon(train: config.Train, letters: dict[str, str]) -> optax.GradientTransformation:
    """Muon as in spec 8.1.

    M = mu M + G and U = mu M + G (Nesterov momentum), without bias correction. U is orthogonalized by 8 + 2
    Newton-Schulz steps and scaled to an RMS of 0.18. Weight decay is decoupled.
    """

    def orthogonal(updates, params=None):
        alike = defaultdict(list)
        for name, leaf in updates.items():
            if not isinstance(leaf, optax.MaskedNode):
                alike[letters[name], leaf.shape[-len(letters[name]) :]].append(name)
        out = dict(updates)
        for (axes, _), names in alike.items():
            out.update(zip(names, orthogonalize(axes, [updates[name] for name in names]), strict=True))
        return out

    return optax.chain(
        optax.trace(train.momentum, nesterov=True),
        optax.stateless(orthogonal),
        optax.add_decayed_weights(train.weight_decay),
        optax.scale_by_learning_rate(schedule(train, train.lr)),
    )


def orthogonalize(letters: str, leaves: Sequence[jax.Array]) -> list[jax.Array]:
    """Orthogonalize every matrix of the given parameters by Newton-Schulz steps and scale it to an RMS of 0.18.

    On a mesh, the matrices are distributed over the devices, and each device computes unsharded matrices. On one
    device, stacked layers are computed one after another, because the temporaries of one layer are several times as
    large as the layer.

    Args:
      letters: Axis letters of the parameters; a key of `MATRICES`.
      leaves: Parameters with these axes, with or without a leading stack axis. All their matrices have one shape.

    Returns:
      Arrays of the shapes of `leaves`.
    """
    sharding, sides = current_rules(), "".join(MATRICES[letters])
    counts = [letter for letter in letters if letter not in sides]
    order = [letters.index(letter) for letter in (*counts, *sides)]
    back = [order.index(axis) for axis in range(len(letters))]
    size = dict(zip(letters, leaves[0].shape[-len(letters) :], strict=True))
    fans = [math.prod(size[letter] for letter in side) for side in MATRICES[letters]]
    turned = lambda x, order: x.transpose([*range(x.ndim - len(order)), *(x.ndim - len(order) + i for i in order)])

    def function(x):
        return _newton_schulz(x.reshape(*x.shape[: x.ndim - len(sides)], *fans)).reshape(x.shape)

    leaves = [turned(leaf, order) for leaf in leaves]
    if sharding is not None and sharding.mesh.size > 1:
        spec = [sharding.weight(letters)[i] for i in order]
        specs = [PartitionSpec(*(None,) * (leaf.ndim - len(spec)), *spec) for leaf in leaves]
        leaves = map_whole_matrices(function, leaves, len(sides), sharding, specs)
    else:
        leaves = [jax.lax.map(function, leaf) if leaf.ndim > len(letters) else function(leaf) for leaf in leaves]
    return [turned(leaf, back) * (_UPDATE_RMS * math.sqrt(max(fans))) for leaf in leaves]


def _newton_schulz(x: jax.Array) -> jax.Array:
    """Drive the singular values of x [..., rows, columns] to 1 by X' = a X + (b A + c A A) X, A = X X^T (spec 8.1)."""
    if tall := x.shape[-2] > x.shape[-1]:  # the transpose gives the same result with smaller products
        x = x.mT
    norm = jnp.linalg.norm(x, ord="fro", axis=(-2, -1), keepdims=True)
    x = x / jnp.where(norm > 0, norm, 1)  # a zero matrix (an expert without tokens) stays zero

    def step(x, coefficients):
        a = x @ x.mT
        b = coefficients[1] * a + coefficients[2] * (a @ a)
        return coefficients[0] * x + b @ x, None

    x = jax.lax.scan(step, x, jnp.array(_NEWTON_SCHULZ, x.dtype))[0]
    return x.mT if tall else x


def update_bias(bias_E: jax.Array, load_E: jax.Array, rate: float) -> jax.Array:
    """Update the router biases for load balancing (spec 3.3).

    Args:
      bias_E: Biases [..., E].
      load_E: Number of tokens of each expert in this step [..., E].
      rate: The change of a bias in one step.

    Returns:
      The biases: raised for experts with less than the mean load, lowered for experts with more.
    """
    return bias_E + rate * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)
