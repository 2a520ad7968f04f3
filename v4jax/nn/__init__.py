"""flax.nnx modules; each file implements one section of the paper."""
