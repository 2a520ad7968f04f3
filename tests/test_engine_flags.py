"""Every option that Python has can be typed: the tables of `engine_flags` against the dataclasses and `LLM`."""

import dataclasses
import inspect

from v4jax import cli, config
from v4jax.engine_flags import CACHE, CACHE_FLAGS, SAMPLING_FLAGS, SERVE, SERVE_FLAGS
from v4jax.serve import LLM, SamplingParams

FLAGS = {flag.name: flag for flag in cli.COMMANDS["generate"].flags}


def names(fields_of: type) -> set[str]:
    return {field.name for field in dataclasses.fields(fields_of)}


def test_every_field_of_the_engine_and_its_cache_has_a_flag():
    assert set(SERVE) == names(config.Serve)
    assert set(CACHE) == names(config.Cache)
    assert {flag.name for flag in [*SERVE_FLAGS.values(), *CACHE_FLAGS.values()]} <= set(FLAGS)


def test_every_argument_of_llm_has_a_flag():
    parameters = inspect.signature(LLM.__init__).parameters
    typed = {"model": "checkpoint"}
    for name, parameter in parameters.items():
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            assert typed.get(name, name) in FLAGS, f"LLM has {name}, and generate has no flag for it"


def test_sampling_flags_are_those_of_sampling_params_and_show_its_defaults():
    unset = SamplingParams()
    said = {flag.name: flag.shown for flag in SAMPLING_FLAGS}
    assert set(said) == names(SamplingParams) - {"logprobs"}  # text alone is printed
    for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "ignore_eos"):
        assert said[name] == str(getattr(unset, name)).lower(), name
