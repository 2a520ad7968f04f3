"""The sizes of an engine's cache are known, and checked against free memory, before anything is allocated."""

import dataclasses

import pytest

from tests.serve.engine_harness import LIMITS
from v4jax import cli, config
from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.checkpoint import save
from v4jax.checkpoint.directory import read_config, save_config
from v4jax.core.errors import UserError
from v4jax.core.system_memory import available_memory
from v4jax.serve.data_parallel import DataParallelGroup, data_parallel_group
from v4jax.serve.engine import Engine
from v4jax.serve.kv_cache_sizes import check_enough_memory, kv_cache_sizes


@pytest.mark.parametrize(
    "limits, cache, option",
    [
        ({}, {"kv_cache_tokens": 2**48}, "kv_cache_tokens 281,474,976,710,656"),
        ({}, {"num_state_snapshots": 2**24}, "num_state_snapshots 16,777,216"),
        ({}, {"kv_cache_memory_bytes": 2**53}, "kv_cache_memory_bytes 9,007,199,254,740,992"),
        ({}, {"block_size": 2**31 - 8}, "max_num_seqs"),
        ({"max_num_seqs": 2**31 - 1}, {}, "max_num_seqs 2,147,483,647"),
        # State slots and block tables alone are too large.
        ({"max_num_seqs": 2**31 - 1}, {"kv_cache_tokens": 512}, "max_num_seqs 2,147,483,647"),
    ],
)
def test_a_cache_larger_than_memory_is_refused_before_it_is_allocated(model, limits, cache, option):
    """The Python objects of the blocks of 2**48 tokens alone would fill the host's memory."""
    with pytest.raises(UserError, match=f"the KV cache takes [0-9,]+ bytes .*{option}.* are free; lower") as error:
        Engine(model, dataclasses.replace(LIMITS, **limits), config.Cache(**cache))
    assert "\n" not in str(error.value)


def test_a_model_without_pools_is_checked_too(model):
    window_only = dataclasses.replace(model.config, layer_types=("swa",) * 4, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match="kv_cache_tokens"):
        check_enough_memory(window_only, LIMITS, config.Cache(kv_cache_tokens=2**48), data_parallel_group(None))


def test_a_checkpoint_that_asks_for_too_much_is_one_line(model, tmp_path, capsys):
    save(model, tmp_path, format="orbax")
    stored = read_config(tmp_path)
    save_config(tmp_path, dataclasses.replace(stored, cache=config.Cache(kv_cache_tokens=2**48)))
    command = ["generate", f"--checkpoint={tmp_path}", "--prompt=", "--max_tokens=2"]
    assert cli.main(command) == 1
    assert "v4jax: the KV cache takes" in capsys.readouterr().err
    check_enough_memory(stored.model, LIMITS, config.Cache(kv_cache_tokens=512), data_parallel_group(None))


@pytest.mark.parametrize(
    "cache",
    [
        config.Cache(),
        config.Cache(kv_cache_tokens=512, num_state_snapshots=0),
        config.Cache(kv_cache_memory_bytes=1 << 20),
    ],
)
@pytest.mark.parametrize("drafts", [0, 1])
def test_the_sizes_are_those_of_the_allocated_cache(model, cache, drafts):
    limits = dataclasses.replace(LIMITS, num_speculative_tokens=drafts)
    spec = KVCacheSpec(model.config)
    sizes = kv_cache_sizes(spec, limits, cache)
    stats = Engine(model, limits, cache).model_runner.memory_stats()
    assert sizes.device_bytes(spec) == stats["kv_device_used_bytes"]
    assert sizes.host_bytes(spec) == stats["kv_host_used_bytes"]


class Accelerator:
    """A device with memory of its own, which the weights fill up to 4,096 bytes."""

    process_index = 0

    def memory_stats(self):
        return {"bytes_limit": 1 << 30, "bytes_in_use": (1 << 30) - 4096}


def test_the_free_memory_of_an_accelerator_counts(model, monkeypatch):
    group = data_parallel_group(None)
    monkeypatch.setattr(DataParallelGroup, "devices", [Accelerator()])
    with pytest.raises(UserError, match="and 4,096 of .*Accelerator.* are free"):
        check_enough_memory(model.config, LIMITS, config.Cache(), group)


def test_available_memory_is_plausible():
    assert 0 < available_memory() < 1 << 50
