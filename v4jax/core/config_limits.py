"""The allowed values of each config field: its type, the range of its numbers, its choices.

Configs come from users and from untrusted checkpoints. The ranges far exceed any published model. They are still narrow
enough that arithmetic on a checked config neither divides by zero nor overflows, and that the list of tensors fits in
memory. `v4jax.config.validate` checks relations between fields.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing

from v4jax.core.errors import ConfigError, printable

MAX_LAYERS = 1024
_MAX_TEXT = 4096  # characters
_COUNT, _SIZE = (1, 2**31 - 1), (1, 2**20)
_INT, _FLOAT = (0, 2**53), (0.0, 1e30)  # ranges of int and float fields that are not listed below
_TINY = 1e-30

# Dotted name of a numeric field -> (minimum, maximum), both inclusive.
RANGES: dict[str, tuple[float, float]] = {
    "model.vocab_size": (1, 2**24),
    "model.hidden_size": _SIZE,
    "model.num_attention_heads": _SIZE,
    "model.head_dim": _SIZE,
    "model.qk_rope_head_dim": (2, 2**20),
    "model.q_lora_rank": _SIZE,
    "model.o_groups": _SIZE,
    "model.o_lora_rank": _SIZE,
    "model.sliding_window": (1, 2**24),
    "model.compress_rate_csa": _SIZE,
    "model.compress_rate_hca": _SIZE,
    "model.max_position_embeddings": _COUNT,
    "model.rms_norm_eps": (_TINY, 1.0),
    "model.num_nextn_predict_layers": (0, 1),
    "model.bos_id": (0, 2**24),
    "model.eos_id": (0, 2**24),
    "model.rope.rope_theta": (1.0 + 1e-6, 1e30),
    "model.rope.compress_rope_theta": (1.0 + 1e-6, 1e30),
    "model.rope.yarn_factor": (1e-6, 1e12),
    "model.rope.yarn_original": (1, 2**40),
    "model.rope.yarn_beta_fast": (1e-6, 1e12),
    "model.rope.yarn_beta_slow": (1e-6, 1e12),
    "model.indexer.index_n_heads": _SIZE,
    "model.indexer.index_head_dim": _SIZE,
    "model.indexer.index_topk": (1, 2**24),
    "model.moe.n_routed_experts": _SIZE,
    "model.moe.num_experts_per_tok": _SIZE,
    "model.moe.moe_intermediate_size": _SIZE,
    "model.moe.n_shared_experts": (0, 1024),
    "model.moe.num_hash_layers": (0, MAX_LAYERS),
    "model.moe.routed_scaling_factor": (_TINY, 1e6),
    "model.moe.swiglu_limit": (_TINY, 1e30),
    "model.mhc.hc_mult": (1, 256),
    "model.mhc.hc_sinkhorn_iters": (1, 1000),
    "model.mhc.hc_eps": (_TINY, 1.0),
    "data.seq_len": _COUNT,
    "data.questions": _COUNT,
    "train.steps": _COUNT,
    "train.batch_size": _COUNT,
    "train.log_every": _COUNT,
    "train.checkpoint_every": _COUNT,
    "train.keep_checkpoints": _COUNT,
    "train.spike_window": _COUNT,
    "train.spike_patience": _COUNT,
    "train.seed": (0, 2**63 - 1),
    "train.momentum": (0.0, 1.0),
    "serve.max_num_seqs": _COUNT,
    "serve.max_model_len": _COUNT,
    "serve.max_num_batched_tokens": _COUNT,
    "serve.num_speculative_tokens": (0, 1024),
    "cache.block_size": (0, 2**31 - 1),
    "cache.kv_cache_tokens": (0, 2**48),
    "cache.num_state_snapshots": (0, 2**24),
    "cache.kv_device_entries": (0, 2**40),
    "cache.snapshot_interval_blocks": (0, 2**31 - 1),
    "cache.kv_load_timeout_s": (1e-6, 1e6),
    **{f"mesh.{axis}": (1, 2**20) for axis in ("slice", "data", "fsdp", "expert", "context", "tensor")},
}

# Dotted name of a string field, or of a tuple of strings -> the allowed strings.
CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("bfloat16", "float32"),
    "data.on_change": ("refuse", "restart"),
    "train.spike_action": ("off", "skip", "rollback"),
    "train.matmul_precision": ("plain", "fp8"),
    "train.expert_weight_format": ("plain", "mxfp4"),
    "train.offload": ("optimizer", "streams"),
    "serve.quantization": ("none", "fp8"),
    "cache.kv_cache_dtype": ("auto", "bf16", "fp8", "fp8_fp4"),
    "cache.kv_eviction_policy": ("s3fifo", "lru"),
    "cache.kv_admission_policy": ("all", "second"),
}


def minimum(path: str) -> float:
    """The least allowed value of an int field, by its dotted name."""
    return RANGES.get(path, _INT)[0]


def check_values(part, path: str = "") -> None:
    """Check the type, range and choices of every field of a config.

    Args:
        part: a config dataclass or one of its nested dataclasses.
        path: dotted name of `part` in the config with a trailing dot, such as "model."; "" for the config itself.

    Raises:
        ConfigError: a value is invalid. The message names the field and the problem.
    """
    for name, hint in _hints(type(part)).items():
        value, where = getattr(part, name), path + name
        if not dataclasses.is_dataclass(hint):
            if found := _problem(value, hint, where):
                raise ConfigError(found)
        elif type(value) is hint:
            check_values(value, f"{where}.")
        else:
            raise ConfigError(f"{where} is {value!r}, and must be a group of fields")


@functools.cache
def _hints(cls: type) -> dict[str, object]:
    return typing.get_type_hints(cls)


def _problem(value, hint, where: str) -> str | None:
    """Return one line that names the field and what is wrong with its value, or None if the value is valid."""
    if not _fits(value, hint):
        return f"{where} is {value!r}, and must be {_described(hint)}"
    if where == "model.layer_types" and len(value) > MAX_LAYERS:
        return f"{where} has {len(value):,} layers, and {MAX_LAYERS:,} are the most"
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, str):
            if len(item) > _MAX_TEXT or item != printable(item):
                return f"{where} is {item!r}, and must be a line of at most {_MAX_TEXT:,} printable characters"
            if where in CHOICES and item not in CHOICES[where]:
                return f"{where} is {item!r}; one of {', '.join(CHOICES[where])}"
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            low, high = RANGES.get(where, _INT if isinstance(item, int) else _FLOAT)
            if not low <= item <= high:
                return f"{where} must be at {f'least {low}' if item < low else f'most {high}'}, got {item}"
    return None


def _fits(value, hint) -> bool:
    """Return whether a value has the declared type of a field. An int is a valid float; a bool is not a number."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return type(value) is tuple and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    return type(value) is hint


def _described(hint) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_described, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_described(typing.get_args(hint)[0])}"
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    return names.get(hint, "nothing")
