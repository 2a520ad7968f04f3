"""The whole model, its layout in memory, and its config in other tongues."""
