"""Which implementation is chosen: the one asked for, the platform's preferred one, or one that runs anywhere."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.core.errors import UserError
from v4jax.core.target_device import target_device, use_target_device
from v4jax.kernels.dispatch import select
from v4jax.kernels.grouped_mlp import api
from v4jax.kernels.tuning import tuned
from v4jax.parallel.rules import MeshRules, use_rules

KNOWN, PREFERRED = ("ref", "fast", "plain"), {"cpu": "fast", "tpu": "plain"}


def device(platform: str, kind: str = "unknown"):
    return types.SimpleNamespace(platform=platform, device_kind=kind)


@pytest.mark.parametrize("platform, want", [("cpu", "fast"), ("tpu", "plain"), ("METAL", "ref")])
def test_select_takes_the_preferred_of_the_platform_or_the_reference(platform, want):
    with use_target_device(device(platform)):
        assert select(None, KNOWN, PREFERRED) == want
        assert select("plain", KNOWN, PREFERRED) == "plain"


def test_select_takes_the_portable_one_on_an_unlisted_platform():
    with use_target_device(device("METAL")):
        assert select(None, KNOWN, PREFERRED, portable="plain") == "plain"


def test_select_refuses_an_unknown_name_in_one_line():
    with pytest.raises(UserError, match="unknown implementation 'quick'; one of ref, fast, plain"):
        select("quick", KNOWN, PREFERRED)


def test_target_device_prefers_concrete_arrays_to_the_mesh_to_the_default():
    last = jax.devices()[-1]
    array = jax.device_put(jnp.zeros(2), last)
    with use_target_device(device("tpu")):
        assert target_device(None, {"a": array}) == last
        assert jax.jit(lambda a: a * (target_device(a).platform == "tpu"))(array + 1).all()  # a tracer has no device
        with use_target_device(None):
            assert target_device() == jax.devices()[0]
    with jax.default_device(last):
        assert target_device() == last


def test_select_takes_the_platform_of_the_mesh_of_the_current_rules():
    mesh = types.SimpleNamespace(devices=np.array([device("tpu")]))
    with use_rules(MeshRules(mesh, None)):
        assert select(None, KNOWN, PREFERRED) == "plain"
        with use_rules(None):
            assert select(None, KNOWN, PREFERRED) == "fast"


def test_experts_of_an_unlisted_platform_are_the_ragged_ones(monkeypatch):
    known = {"ref": None, "xla_blocked": None, "xla_ragged_dot": lambda *_, limit, fp8: limit}
    monkeypatch.setattr(api, "_IMPLEMENTATIONS", known)
    with use_target_device(device("METAL")):
        assert api.experts(*[None] * 5, limit=10.0) == 10.0


def test_tuned_numbers_of_a_device_kind_override_those_of_its_platform(tmp_path, monkeypatch):
    text = '{"default": {"a": 1, "b": 1, "c": 1}, "gpu": {"b": 2, "c": 2}, "NVIDIA H200": {"c": 3}}'
    (tmp_path / "example.json").write_text(text)
    monkeypatch.setattr("v4jax.kernels.tuning._DIRECTORY", tmp_path)
    found = []
    for target in (device("tpu"), device("gpu", "NVIDIA A100"), device("gpu", "NVIDIA H200")):
        with use_target_device(target):
            found.append(dict(tuned("example")))
    assert found == [{"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 2, "c": 2}, {"a": 1, "b": 2, "c": 3}]
