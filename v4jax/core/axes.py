"""The axis letters in names such as `q_BTNH` and in einsum strings.

In the modules of the model (`nn`, `models`) each letter has one meaning; what follows "outside the model" is its
meaning in other packages and in expert parallelism. Upper-case letters denote array axes. The suffix of a name lists
its axes in order: `x_BTXD` has a batch, a token, a residual stream and a hidden axis. `LOGICAL` maps the letters to
logical axis names. Parameters are declared with logical axes, and `parallel/rules.py` maps logical axes to mesh axes.
"""

LETTERS = {
    "A": "KV block of a row, in the order of its tokens (block tables)",
    "B": "batch row; outside the model also token of the flattened batch (expert kernels)",
    "T": "token of this call (a query)",
    "S": "row that a query can attend (window rows, then compressed entries); outside the model slot of a ring",
    "C": "compressed entry of a layer; outside the model received row (token dispatch), column of a matrix",
    "P": "token inside one compression window; outside the model device (token dispatch), slot of a KV block, tile",
    "D": "hidden size; outside the model data-parallel rank (the engine)",
    "O": "hidden size, on the output side of a square matrix",
    "X": "residual stream of the hyper-connection (the copies)",
    "Y": "residual stream, on the output side of a mixing matrix",
    "M": "hyper-connection coefficient (X read, X write, X * X mix)",
    "N": "attention head; outside the model item of a list",
    "H": "head dimension (keys equal values)",
    "W": "compressor projection width: H (indexer: L), twice that with overlap; outside the model steps of a window",
    "Q": "query low rank",
    "G": "output group; outside the model both halves U of an expert merged (expert kernels)",
    "I": "inputs of one output group (heads of the group times H)",
    "R": "output low rank; outside the model row of a flattened array, such as one (token, expert)",
    "J": "indexer head",
    "L": "indexer head dimension",
    "K": "experts active for a token; entries picked for a query; outside the model draft token, top log-probability",
    "E": "routed expert",
    "F": "expert inner size",
    "U": "gate or up half of an expert (size 2)",
    "V": "vocabulary",
    "Z": "state slot of the KV cache; outside the model KV block of the pool (device entry cache)",
}

LOGICAL = {
    "V": "vocab",
    "D": "embed",
    "O": "embed_out",
    "X": "stream",
    "Y": "stream_out",
    "M": "coefficient",
    "N": "heads",
    "H": "head_dim",
    "W": "kv_width",
    "P": "pool",
    "Q": "q_lora_rank",
    "G": "o_group",
    "I": "o_group_in",
    "R": "o_lora_rank",
    "J": "index_heads",
    "L": "index_dim",
    "E": "expert",
    "F": "mlp",
    "U": "gate_up",
    "K": "picks",
    "S": "scale",
}


# Parameters (by their letters) in which a letter has another logical axis than in `LOGICAL`, so that sharding rules can
# shard it differently: the routed experts, the up-projections of queries, and the router.
SPECIAL = {
    "EUDF": {"D": "expert_embed", "F": "expert_mlp"},
    "EFD": {"D": "expert_embed", "F": "expert_mlp"},
    "QNH": {"Q": "q_rank_in", "H": "head_dim_out"},
    "QJL": {"Q": "q_rank_in", "L": "index_dim_out"},
    "DE": {"E": "expert_score"},
}

ACTIVATION = {"B": "batch", "T": "token", "V": "vocab"}  # the only axes of activations that sharding rules can name


def logical(letters: str) -> tuple[str, ...]:
    """Return the logical axes of a parameter, given its letters: `logical("DQ") == ("embed", "q_lora_rank")`."""
    return tuple(SPECIAL.get(letters, {}).get(letter, LOGICAL[letter]) for letter in letters)
