"""The flags of `v4jax generate`: one for each option of `LLM`, its cache and `SamplingParams`.

Those of the engine and its cache come from the fields of `config.Serve` and `config.Cache`: the type, the comment as
help, and range and choices of `core/config_limits.py`.
"""

from __future__ import annotations

import dataclasses
import re
import typing

from absl import flags

from v4jax import config
from v4jax.cli_flags import Flag, define_path, define_size, field_comments
from v4jax.core.config_limits import CHOICES, minimum

STORED = "the checkpoint's"  # shown default of options that `LLM` takes from the checkpoint
_DEFINE = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_bool,
    str: flags.DEFINE_string,
}


def _flags(group: str, fields_of: type) -> dict[str, Flag]:
    """Return a flag for each field of the config dataclass `fields_of`, which is `group` of a Config, by name."""
    hints, helps = typing.get_type_hints(fields_of), dict(field_comments(fields_of))
    return {
        field.name: _flag(f"{group}.{field.name}", field.name, helps[field.name], hints[field.name], field.default)
        for field in dataclasses.fields(fields_of)
    }


def _flag(path: str, name: str, comment: str, kind: type, default: object) -> Flag:
    define, options = _DEFINE[kind], {}
    if name.endswith("_bytes"):
        define = define_size
    elif name == "kv_dir":
        define = define_path
    elif path in CHOICES:
        define, options = flags.DEFINE_enum, {"enum_values": list(CHOICES[path])}
    elif kind is int:
        options = {"lower_bound": minimum(path)}
    shown = STORED if default == "" else f"{STORED}, else {str(default).lower() if kind is bool else default}"
    return Flag(name, re.sub(r" \(see [^)]*\)", "", comment), define, options=options, shown=shown)


SERVE_FLAGS = _flags("serve", config.Serve)
CACHE_FLAGS = _flags("cache", config.Cache)
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
    Flag(
        "presence_penalty",
        "lower the logits of tokens that the text contains",
        flags.DEFINE_float,
        options={"lower_bound": -2.0, "upper_bound": 2.0},
        shown="0.0",
    ),
    Flag(
        "frequency_penalty",
        "lower the logits of tokens as often as the text contains them",
        flags.DEFINE_float,
        options={"lower_bound": -2.0, "upper_bound": 2.0},
        shown="0.0",
    ),
    Flag(
        "repetition_penalty",
        "divide the logits of tokens that prompt or text contain",
        flags.DEFINE_float,
        options={"lower_bound": 0.0},
        shown="1.0",
    ),
    Flag("seed", "the same seed gives the same text", flags.DEFINE_integer, shown="a new one every time"),
    Flag("stop", "end at this string; may be repeated", flags.DEFINE_multi_string, ()),
    Flag("stop_token_ids", "end at these token ids, such as 5,7", flags.DEFINE_list),
    Flag(
        "min_tokens", "do not end before this many tokens", flags.DEFINE_integer, options={"lower_bound": 0}, shown="0"
    ),
    Flag("allowed_token_ids", "sample these token ids alone, such as 5,7", flags.DEFINE_list),
    Flag("bad_words", "never write this string; may be repeated", flags.DEFINE_multi_string, ()),
    Flag("ignore_eos", "go on after the end of the document", flags.DEFINE_bool, shown="false"),
)
