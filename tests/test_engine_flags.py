"""Every option that Python has can be typed: the tables of `engine_flags` against the dataclasses and `LLM`."""

import dataclasses
import inspect

from v4jax import cli, config
from v4jax.core.config_limits import CHOICES, RANGES
from v4jax.engine_flags import CACHE_FLAGS, SAMPLING_FLAGS, SERVE_FLAGS
from v4jax.serve import LLM, SamplingParams

FLAGS = {flag.name: flag for flag in cli.COMMANDS["generate"].flags}


def names(fields_of: type) -> set[str]:
    return {field.name for field in dataclasses.fields(fields_of)}


def test_every_field_of_the_engine_and_its_cache_has_a_flag_with_help():
    assert set(SERVE_FLAGS) == names(config.Serve)
    assert set(CACHE_FLAGS) == names(config.Cache)
    engine = [*SERVE_FLAGS.values(), *CACHE_FLAGS.values()]
    assert {flag.name for flag in engine} <= set(FLAGS)
    assert all(flag.help and "(see" not in flag.help for flag in engine)


def test_bounds_and_choices_are_those_of_the_config():
    assert SERVE_FLAGS["max_num_seqs"].options == {"lower_bound": RANGES["serve.max_num_seqs"][0]}
    assert CACHE_FLAGS["block_size"].options == {"lower_bound": 0}
    assert CACHE_FLAGS["kv_cache_dtype"].values == CHOICES["cache.kv_cache_dtype"]
    assert CACHE_FLAGS["kv_host_bytes"].form == "BYTES"


def test_every_argument_of_llm_has_a_flag():
    parameters = inspect.signature(LLM.__init__).parameters
    typed = {"model": "checkpoint"}
    for name, parameter in parameters.items():
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            assert typed.get(name, name) in FLAGS, f"LLM has {name}, and generate has no flag for it"


def test_sampling_flags_are_those_of_sampling_params_and_show_its_defaults():
    unset = SamplingParams()
    said = {flag.name: flag.shown for flag in SAMPLING_FLAGS}
    # The text of one continuation is printed, and requests of one call have no order; dicts are for Python.
    python_alone = {"logprobs", "prompt_logprobs", "n", "priority", "logit_bias", "structured_outputs"}
    assert set(said) == names(SamplingParams) - python_alone
    penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens")
    for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "ignore_eos", *penalties):
        assert said[name] == str(getattr(unset, name)).lower(), name
