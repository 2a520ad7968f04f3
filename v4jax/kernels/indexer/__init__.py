"""Lightning indexer: scores of compressed entries, and the exact top-k over them (spec 2.6)."""

from v4jax.kernels.indexer.api import score, score_picked, topk_mask, topk_search

__all__ = ["score", "score_picked", "topk_mask", "topk_search"]
