"""From text to batches: the embedded corpus, byte-level BPE, packing, the grain pipeline, compression baselines."""
