"""Text to batches: the embedded corpus, byte-level BPE, packing, the grain pipeline and its baselines."""
