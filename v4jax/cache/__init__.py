"""The paged KV cache of a served model: its storage formats, sizes, block pool, prefix hashes and offload tiers."""
