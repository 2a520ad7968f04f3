"""Checkpoints on disk: safetensors by byte range, Hugging Face directories, name mapping."""
