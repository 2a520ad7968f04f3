"""Floor 2: flax.nnx modules, one section of the paper a file."""
