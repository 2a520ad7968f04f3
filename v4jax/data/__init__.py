"""Floor 4: text to batches: the embedded corpus, byte-level BPE, packing, the grain pipeline and its baselines."""
