"""Formats of Hugging Face checkpoints, two modules for each model_type. `models/hf_config.py` chooses among them."""
