"""The axis alphabet: the one meaning of every letter in names (`q_BTNH`) and einsum strings.

Upper-case letters are array axes. A name's suffix gives its axes in order, so `x_BTXD` has batch, token, residual
stream and hidden axes. `LOGICAL` names the same axes in words: parameters are declared with these words, and
`parallel/rules.py` maps words to mesh axes.
"""

LETTERS = {
    "B": "batch row",
    "T": "token of this call (a query)",
    "S": "row that a query can attend (keys: window rows, then compressed entries)",
    "C": "compressed entry of a layer",
    "P": "token inside one compression window",
    "D": "hidden size",
    "O": "hidden size, on the output side of a square matrix",
    "X": "residual stream of the hyper-connection (the copies); Y is a second one",
    "M": "hyper-connection coefficient (X read, X write, X * X mix)",
    "N": "attention head",
    "H": "head dimension (keys equal values)",
    "W": "compressor projection width: H, or 2 H where windows overlap",
    "Q": "query low rank",
    "G": "output group",
    "I": "inputs of one output group (heads of the group times H)",
    "R": "output low rank",
    "J": "indexer head",
    "L": "indexer head dimension",
    "K": "experts active for a token; entries picked for a query",
    "E": "routed expert",
    "F": "expert inner size",
    "U": "gate or up half of an expert (size 2)",
    "V": "vocabulary",
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


# The same letter means another logical axis where a layout has to be free to split it otherwise: inside the routed
# experts, both ends of what makes queries, and the scores of a router.
SPECIAL = {
    "EUDF": {"D": "expert_embed", "F": "expert_mlp"},
    "EFD": {"D": "expert_embed", "F": "expert_mlp"},
    "QNH": {"Q": "q_rank_in", "H": "head_dim_out"},
    "QJL": {"Q": "q_rank_in", "L": "index_dim_out"},
    "DE": {"E": "expert_score"},
}

ACTIVATION = {"B": "batch", "T": "token", "V": "vocab"}  # of activations; their other axes are never named in a rule


def logical(letters: str) -> tuple[str, ...]:
    """Logical axis names of a parameter, from its letters: `logical("DQ") == ("embed", "q_lora_rank")`."""
    return tuple(SPECIAL.get(letters, {}).get(letter, LOGICAL[letter]) for letter in letters)
