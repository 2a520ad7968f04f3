"""Formats of Hugging Face's config.json, a module for each model_type. `models/hf_config.py` chooses among them."""
