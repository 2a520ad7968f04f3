"""Modules in flax.nnx, one section of the paper a file."""
