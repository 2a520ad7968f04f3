"""Upgrade of configs that earlier versions wrote to v4jax.json, by one table of renamed fields."""

from __future__ import annotations

CONFIG_VERSION = 2

# group -> {field name in version 1: field name in version 2}. Fields that are not listed kept their names.
_RENAMED = {
    "model": {
        "schedule": "layer_types",
        "heads": "num_attention_heads",
        "rope_dim": "qk_rope_head_dim",
        "q_rank": "q_lora_rank",
        "o_rank": "o_lora_rank",
        "window": "sliding_window",
        "csa_ratio": "compress_rate_csa",
        "hca_ratio": "compress_rate_hca",
        "max_positions": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "mtp_layers": "num_nextn_predict_layers",
        "init_std": "initializer_range",
    },
    "model.rope": {"theta": "rope_theta", "compress_theta": "compress_rope_theta"},
    "model.indexer": {"heads": "index_n_heads", "head_dim": "index_head_dim", "topk": "index_topk"},
    "model.moe": {
        "experts": "n_routed_experts",
        "active": "num_experts_per_tok",
        "inner": "moe_intermediate_size",
        "shared": "n_shared_experts",
        "hash_layers": "num_hash_layers",
        "route_scale": "routed_scaling_factor",
    },
    "model.mhc": {"streams": "hc_mult", "sinkhorn_iters": "hc_sinkhorn_iters", "eps": "hc_eps"},
    "train": {
        "matmul": "matmul_precision",
        "expert_weights": "expert_weight_format",
        "bias_rate": "bias_update_speed",
        "balance_weight": "balance_loss_weight",
        "mtp_weight": "mtp_loss_weight",
        "indexer_weight": "indexer_loss_weight",
        "spike": "spike_action",
        "hang_seconds": "hang_timeout_s",
        "hang_exit": "exit_on_hang",
    },
    "serve": {
        "max_batch": "max_num_seqs",
        "max_seq_len": "max_model_len",
        "prefill_chunk": "max_num_batched_tokens",
        "speculative_tokens": "num_speculative_tokens",
        "precision": "quantization",
    },
    "cache": {
        "layout": "kv_cache_dtype",
        "block": "block_size",
        "tokens": "kv_cache_tokens",
        "prefix": "enable_prefix_caching",
        "records": "num_state_snapshots",
        "record_every": "snapshot_interval_blocks",
        "device": "kv_cache_memory_bytes",
        "hot": "kv_device_entries",
        "host": "kv_host_bytes",
        "disk": "kv_disk_bytes",
        "directory": "kv_dir",
        "policy": "kv_eviction_policy",
        "admission": "kv_admission_policy",
        "deadline": "kv_load_timeout_s",
    },
    "mesh": {"layout": "rules"},
}
_RENAMED_VALUES = {("serve", "quantization"): {"model": "none"}, ("cache", "kv_cache_dtype"): {"model": "auto"}}


def upgrade_config(values: dict, version: int) -> dict:
    """Upgrade the nested dict of a Config to the current version.

    Args:
        values: output of `config.to_dict` in `version`. Fields unknown to that version are kept unchanged.
        version: 1 or `CONFIG_VERSION`.

    Returns:
        The nested dict in the current version.
    """
    return values if version == CONFIG_VERSION else _upgrade_group(values, "")


def _upgrade_group(values: dict, path: str) -> dict:
    renamed, upgraded = _RENAMED.get(path, {}), {}
    for old, value in values.items():
        name = renamed.get(old, old)
        if isinstance(value, dict):
            value = _upgrade_group(value, f"{path}.{name}" if path else name)
        elif isinstance(value, str):
            value = _RENAMED_VALUES.get((path, name), {}).get(value, value)
        upgraded[name] = value
    return upgraded
