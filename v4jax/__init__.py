"""DeepSeek-V4 in JAX: train, convert, plan and serve one model family, from a laptop to a pod."""

import importlib

__version__ = "0.1.0"

# Public names resolve on first use, so that `import v4jax` is quick, imports no jax and touches no device.
_HOMES = {  # name -> module, or module:name there
    "Config": "v4jax.config",
    "LLM": "v4jax.serve",
    "MeshConfig": "v4jax.serve",
    "SamplingParams": "v4jax.serve",
    "StructuredOutputsParams": "v4jax.serve",
    "Tokenizer": "v4jax.data.tokenizer",
    "Trainer": "v4jax.train.trainer",
    "checkpoint_tensors": "v4jax.checkpoint.param_mapping:tensors",
    "count_parameters": "v4jax.models.param_count",
    "indexer_scores": "v4jax.models.indexer_scores",
    "load": "v4jax.checkpoint",
    "load_config": "v4jax.config:load",
    "make_dataset": "v4jax.data.pipeline",
    "save": "v4jax.checkpoint",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'v4jax' has no attribute {name!r}")
    module, _, inner = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), inner or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
