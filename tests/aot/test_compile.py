"""Steps compile for devices that are not there, and the closed form agrees with the compiler about what it can know.

The same code compiles for fake CPU devices everywhere, and for TPUs where libtpu is installed.
"""

import dataclasses
import importlib.util

import jax
import pytest

from v4jax import config as config_lib
from v4jax.config import Mesh
from v4jax.tools import compiled
from v4jax.tools.estimate import Work, default_mesh, estimate
from v4jax.tools.topology import parse

PLACE = parse("v5e:2x2")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def one_layer(kind: str) -> config_lib.Config:
    config = config_lib.load("tiny")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, schedule=(kind,), mtp_layers=0))


def check(config: config_lib.Config, mesh: Mesh | None, work: Work, travels: str, near: float, **where):
    """near: what small arrays on whole tiles may add to the bytes of arguments."""
    mesh = mesh or default_mesh(config, PLACE, work)
    result = compiled.compile_step(config, PLACE, mesh, work, **where)
    closed = estimate(config, PLACE, mesh, work).device_bytes
    held = sum(closed[part] for part in (("weights", "optimizer") if work.mode == "train" else ("weights", "kv")))
    assert result.device_bytes["arguments"] == pytest.approx(held, rel=near)
    changed = held if work.mode == "train" else closed["kv"]
    assert -result.device_bytes["donated"] == pytest.approx(changed, rel=0.2 + near)  # what a step changes, in place
    assert 0 < sum(result.device_bytes.values()) < result.limit == PLACE.device_memory
    assert result.collectives.get(travels, 0) > 0, result.collectives
    metrics = {record["metric"] for record in compiled.records(result, {"source": "compiled"})}
    assert {"device_bytes", "device_bytes_limit", "collective_bytes", "fits"} <= metrics


@pytest.mark.parametrize("kind, mesh, work", [
    ("swa", Mesh("fsdp"), Work("train", 64, 8)), ("csa", None, Work("decode", 512, 8)),
])  # fmt: skip
def test_a_step_compiles_for_four_devices_and_the_closed_form_agrees(kind, mesh, work):
    check(one_layer(kind), mesh, work, "all-gather", 0.15, on=jax.devices()[:4], options=QUICK)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (extra tpu)")
@pytest.mark.parametrize("work", [Work("train", 64, 8), Work("decode", 512, 8), Work("prefill", 512, 4)])
def test_a_step_compiles_for_four_tpus_and_the_closed_form_agrees(work):
    check(one_layer("csa"), None, work, "ragged-all-to-all", 0.6)
