"""Steps compile for devices that are not there, and the closed form agrees with the compiler about what it can know.

The same code compiles for fake CPU devices everywhere, and for TPUs where libtpu is installed.
"""

import dataclasses
import importlib.util

import jax
import pytest

from v4jax import config as config_lib
from v4jax.tools import compiled
from v4jax.tools.estimate import Work, default_mesh, estimate
from v4jax.tools.topology import parse

PLACE = parse("v5e:2x2")
TPU = pytest.param(True, marks=pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (extra tpu)"
))  # fmt: skip


def one_layer():
    config = config_lib.load("tiny")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, schedule=("csa",), mtp_layers=0))


@pytest.mark.parametrize("tpu", [False, TPU])
@pytest.mark.parametrize("mode, context, rows", [("train", 64, 8), ("decode", 512, 8), ("prefill", 512, 4)])
def test_a_step_compiles_for_four_devices_and_the_closed_form_agrees(mode, context, rows, tpu):
    config, work = one_layer(), Work(mode, context, rows)
    mesh = default_mesh(config, PLACE, work)
    on, options = (None, compiled.EFFORT) if tpu else (jax.devices()[:4], {"xla_backend_optimization_level": 0})
    result = compiled.compile_step(config, PLACE, mesh, work, on, options)
    closed = estimate(config, PLACE, mesh, work).device_bytes
    held = sum(closed[part] for part in (("weights", "optimizer") if mode == "train" else ("weights", "kv")))
    assert result.device_bytes["arguments"] == pytest.approx(held, rel=0.15)
    state = {"train": held, "decode": closed.get("kv"), "prefill": closed.get("kv")}[mode]
    assert -result.device_bytes["donated"] == pytest.approx(state, rel=0.35)  # what a step changes, in place
    assert 0 < sum(result.device_bytes.values()) < result.limit == PLACE.device_memory
    assert result.collectives["ragged-all-to-all" if tpu else "all-gather"] > 0, result.collectives  # CPU: the twin
    records = compiled.records(result, {"source": "compiled"})
    assert {"device_bytes", "device_bytes_limit", "collective_bytes", "fits"} <= {r["metric"] for r in records}
