"""The flags of `v4jax generate`: one row for each option of `LLM`, its cache and `SamplingParams`.

A row holds the help text, and the limits that the option's type does not express. Types come from the fields of
`config.Serve` and `config.Cache`, so a new field needs one new row, and a test fails while the row is missing.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping

from absl import flags

from v4jax import config
from v4jax.cli_flags import Flag, define_path, define_size
from v4jax.core.config_limits import CHOICES

STORED = "the checkpoint's"  # shown default of options that `LLM` takes from the checkpoint
_DEFINE = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    str: flags.DEFINE_string,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Help of one option.

    least: lower bound of a number. choices: all values of a string. size: a number of bytes. path: a file or directory.
    """

    help: str
    least: int | None = None
    choices: tuple[str, ...] = ()
    size: bool = False
    path: bool = False


SERVE = {
    "max_num_seqs": Row("requests that decode together, on each device", least=1),
    "max_model_len": Row("most tokens of a request, prompt included", least=1),
    "max_num_batched_tokens": Row("most prompt tokens that are prefilled between two decode steps", least=1),
    "num_speculative_tokens": Row("tokens that the MTP layer drafts in each step", least=0),
    "batch_invariant": Row("bits of an answer do not depend on what else runs"),
    "quantization": Row("of the large matrices: none, or fp8", choices=CHOICES["serve.quantization"]),
}
CACHE = {
    "kv_cache_dtype": Row("format of the KV cache; auto: the model's dtype", choices=CHOICES["cache.kv_cache_dtype"]),
    "block_size": Row("tokens of a block; 0: the least multiple of the compression rates from 256 on", least=0),
    "kv_cache_tokens": Row("room of the KV cache in tokens; 0: max_num_seqs sequences of max_model_len", least=0),
    "kv_cache_memory_bytes": Row("accelerator memory for the KV cache, such as 2GiB; 0: kv_cache_tokens", size=True),
    "enable_prefix_caching": Row("reuse blocks of earlier requests with the same beginning"),
    "num_state_snapshots": Row("state snapshots kept for prefix reuse", least=0),
    "snapshot_interval_blocks": Row("blocks between two snapshots of a prompt; 0: only at its end", least=0),
    "kv_device_entries": Row("entries a CSA layer kept on the device, the rest in host memory; 0: all", least=0),
    "kv_host_bytes": Row("host memory for blocks that leave the device, such as 64GiB", size=True),
    "kv_disk_bytes": Row("disk space for them in --kv_dir, such as 1TiB", size=True),
    "kv_dir": Row("directory that keeps them over restarts; one engine at a time", path=True),
    "kv_eviction_policy": Row("eviction from a full host or disk", choices=CHOICES["cache.kv_eviction_policy"]),
    "kv_admission_policy": Row(
        "blocks that move to host and disk: all, or those asked for twice", choices=CHOICES["cache.kv_admission_policy"]
    ),
    "kv_load_timeout_s": Row("seconds without progress after which a request stops waiting for host and disk"),
}


def _flags(fields_of: type, rows: Mapping[str, Row]) -> dict[str, Flag]:
    """Return a flag for each row, by the name of its field in the config dataclass `fields_of`."""
    hints, unset = typing.get_type_hints(fields_of), fields_of()
    return {name: _flag(name, row, hints[name], getattr(unset, name)) for name, row in rows.items()}


def _flag(name: str, row: Row, kind: type, default: object) -> Flag:
    options = {}
    if row.size:
        define = define_size
    elif row.path:
        define = define_path
    elif row.choices:
        define, options = flags.DEFINE_enum, {"enum_values": list(row.choices)}
    else:
        define = _DEFINE[kind]
        if row.least is not None:
            options = {"lower_bound": row.least}
    shown = STORED if default == "" else f"{STORED}, else {str(default).lower() if kind is bool else default}"
    return Flag(name, row.help, define, options=options, shown=shown)


SERVE_FLAGS = _flags(config.Serve, SERVE)
CACHE_FLAGS = _flags(config.Cache, CACHE)
SAMPLING_FLAGS = (
    Flag("max_tokens", "most tokens to add", flags.DEFINE_integer, options={"lower_bound": 1}, shown="16"),
    Flag(
        "temperature",
        "randomness; 0 always takes the likeliest token",
        flags.DEFINE_float,
        options={"lower_bound": 0.0},
        shown="1.0",
    ),
    Flag(
        "top_k",
        "sample among the k likeliest tokens; 0: all",
        flags.DEFINE_integer,
        options={"lower_bound": 0},
        shown="0",
    ),
    Flag(
        "top_p",
        "sample among the fewest tokens that hold this probability",
        flags.DEFINE_float,
        options={"lower_bound": 0.0, "upper_bound": 1.0},
        shown="1.0",
    ),
    Flag(
        "min_p",
        "drop tokens below this fraction of the likeliest one's probability",
        flags.DEFINE_float,
        options={"lower_bound": 0.0, "upper_bound": 1.0},
        shown="0.0",
    ),
    Flag("seed", "the same seed gives the same text", flags.DEFINE_integer, shown="a new one every time"),
    Flag("stop", "end at this string; may be repeated", flags.DEFINE_multi_string, ()),
    Flag("stop_token_ids", "end at these token ids, such as 5,7", flags.DEFINE_list),
    Flag("ignore_eos", "go on after the end of the document", flags.DEFINE_bool, shown="false"),
)
