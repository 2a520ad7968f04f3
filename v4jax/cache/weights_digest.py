"""Digest of a model's weights, independent of the mesh. It ties a cache that outlives the model to its weights."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from v4jax.cache import block_hash
from v4jax.parallel import distributed


def weights_digest(variables: nnx.State) -> bytes:
    """Return a digest of all weights, 16 bytes, the same on any mesh. All processes must call it at the same point."""
    whole, experts = {}, {}
    is_variable = lambda node: isinstance(node, nnx.Variable)
    for path, variable in jax.tree_util.tree_leaves_with_path(variables, is_leaf=is_variable):
        letters = getattr(variable, "letters", "")  # a parameter that was replaced by hand may have none
        split = len(letters) > 1 and letters[0] == "E"  # expert weights; perhaps no process has all of them
        for inside, leaf in jax.tree_util.tree_leaves_with_path(variable):
            (experts if split else whole)[jax.tree_util.keystr(path + inside)] = leaf
    return block_hash.tree_digest(whole | _row_digests(experts))


def _row_digests(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Apply `block_hash.row_digests` to arrays whose first axis may be sharded over all processes."""
    found = {name: np.zeros((len(array), block_hash.SIZE), np.uint8) for name, array in arrays.items()}
    for name, array in arrays.items():
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                found[name][shard.index[0]] = block_hash.row_digests(np.asarray(shard.data))
    if not found:
        return found
    own = np.concatenate(list(found.values())).tobytes()  # zeros for rows that this process does not hold
    each = distributed.all_gather_bytes(own)
    known = np.max([np.frombuffer(data, np.uint8) for data in each], axis=0).reshape(-1, block_hash.SIZE)
    ends = np.cumsum([len(rows) for rows in found.values()])
    return dict(zip(found, np.split(known, ends[:-1]), strict=True))
