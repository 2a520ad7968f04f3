"""Serving: sampling, the batched engine, and its Python API `LLM`."""

from v4jax.config import Mesh as MeshConfig
from v4jax.serve.llm import LLM
from v4jax.serve.outputs import CompletionOutput, Logprob, RequestOutput
from v4jax.serve.sampling_params import SamplingParams, StructuredOutputsParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "Logprob",
    "MeshConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
]
