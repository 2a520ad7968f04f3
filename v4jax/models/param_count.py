"""Parameter counts of a model from its abstract shapes. No arrays are allocated."""

import functools
import math
from typing import NamedTuple

from flax import nnx

from v4jax import config
from v4jax.models.transformer import Transformer
from v4jax.nn.linear import Buffer

# The first of these words in a parameter's path gives its group (spec 1.2). Hash tables are data and are not counted.
_GROUPS = {
    "mtp": "mtp",
    "embed": "embedding",
    "head": "head",
    "experts": "routed experts",
    "shared": "shared experts",
    "router": "router",
    "attn": "attention",
    "attn_mhc": "mhc",
    "ffn_mhc": "mhc",
    "head_mhc": "mhc",
    "attn_norm": "norms",
    "ffn_norm": "norms",
    "norm": "norms",
}


class ParamCounts(NamedTuple):
    """Numbers of parameters.

    Attributes:
        total: the backbone with embedding and head, without MTP.
        active: the backbone parameters that one token uses, without the input embedding and with the head. This
            convention gives the published 13B and 49B (spec 1.2).
        by_group: embedding, head, attention (with compressors and indexers), routed experts, shared experts, router,
            mhc and norms, which add up to `total`, and mtp, which shares embedding and head with the backbone.
    """

    total: int
    active: int
    by_group: dict[str, int]


@functools.cache
def parameter_table(model: config.Model) -> dict[tuple[str, ...], tuple[str, tuple[int, ...], bool]]:
    """Return (axis letters, shape, whether it is trained) of every array by its path, with repeated layers stacked."""
    tree = nnx.state(nnx.eval_shape(lambda: Transformer(model, nnx.Rngs(0), scan=True)), nnx.Any(nnx.Param, Buffer))
    return {
        tuple(map(str, path)): (leaf.letters, leaf.get_value().shape, isinstance(leaf, nnx.Param))
        for path, leaf in nnx.to_flat_state(tree)
    }


@functools.cache
def count_parameters(model: config.Model) -> ParamCounts:
    """Count the parameters of a model from its abstract tree."""
    by_group = dict.fromkeys(_GROUPS.values(), 0)
    for path, (_, shape, _) in parameter_table(model).items():
        if path[-1] != "table" or path[0] == "embed":
            by_group[_group(path)] += math.prod(shape)
    total = sum(by_group.values()) - by_group["mtp"]
    experts = model.moe.n_routed_experts
    idle = by_group["routed experts"] // experts * (experts - model.moe.num_experts_per_tok)
    return ParamCounts(total, total - by_group["embedding"] - idle, by_group)


def _group(path: tuple) -> str:
    return next(_GROUPS[part] for part in path if part in _GROUPS)
