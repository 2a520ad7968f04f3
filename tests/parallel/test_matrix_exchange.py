"""Muon on matrices that a layout splits gives the update of whole ones, by sending matrices and summing none."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests.parallel.meshes import MESHES
from v4jax.config import Train
from v4jax.parallel.rules import make_mesh_rules, use_rules
from v4jax.train.optim import make_optimizer

pytestmark = pytest.mark.slow

# Every way in which axes of matrices are split or joined, some stacked over layers, some alike, and one for AdamW.
LETTERS = {
    "gate_up": "EUDF",
    "down": "EFD",
    "q_up": "QNH",
    "q_down": "DQ",
    "o_up": "GRD",
    "o_down": "GIR",
    "mix": "MXD",
    "shared": "DUF",
    "embed": "VD",
    "down_first": "EFD",
    "q_down_stack": "DQ",
}
SIZES = {"E": 8, "U": 2, "D": 16, "F": 24, "Q": 8, "N": 4, "H": 8, "G": 4, "R": 8, "I": 16, "M": 24, "X": 2, "V": 32}
STACKED = ("down", "q_down_stack")
SHAPES = {name: (3,) * (name in STACKED) + tuple(SIZES[letter] for letter in axes) for name, axes in LETTERS.items()}
OPTIMIZER = make_optimizer(Train(steps=10, warmup=1, lr=1.0, adam_lr=1.0), LETTERS)


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def updates(place):
    """Of two steps, so that momentum counts."""
    params, out = place(draw(0)), []
    state = jax.jit(OPTIMIZER.init)(params)
    step = jax.jit(OPTIMIZER.update)
    for seed in (1, 2):
        update, state = step(place(draw(seed)), state, params)
        out.append(update)
    return out


@pytest.fixture(scope="module")
def alone():
    return jax.device_get(updates(lambda arrays: arrays))


@pytest.mark.parametrize("name", ["data", "fsdp", "expert", "context", "pod, slices"])
def test_split_matrices_get_the_update_of_whole_ones(name, alone):
    rules = make_mesh_rules(MESHES[name])
    where = rules.parameters(LETTERS, SHAPES)
    if name != "data":
        assert {parameter for parameter, sharding in where.items() if sharding.is_fully_replicated} <= {"mix"}
    with use_rules(rules):
        got = updates(lambda arrays: jax.device_put(arrays, where))
    for one, other in zip(got, alone, strict=True):
        for parameter, want in other.items():
            assert isinstance(one[parameter].sharding, NamedSharding)
            np.testing.assert_allclose(one[parameter], want, atol=1e-5 * np.abs(want).max(), err_msg=parameter)


@pytest.mark.parametrize("name", ["fsdp", "expert", "pod, slices"])
def test_devices_exchange_parts_of_matrices_and_sum_nothing_but_the_norm(name):
    rules = make_mesh_rules(MESHES[name])
    where = rules.parameters(LETTERS, SHAPES)
    arrays = {key: jax.ShapeDtypeStruct(SHAPES[key], np.float32, sharding=where[key]) for key in SHAPES}
    with use_rules(rules):
        state = jax.eval_shape(OPTIMIZER.init, arrays)
        program = jax.jit(OPTIMIZER.update).lower(arrays, state, arrays).compile().as_text()
    found = re.findall(r"= (.+?) (all-[a-z-]+|reduce-scatter|collective-permute)\(", program)
    assert {kind for _, kind in found} - {"all-gather"} == {"all-to-all", "all-reduce"}  # gathered: replicas' results
    assert set(re.findall(r"\w+\[.*?\]", "".join(shape for shape, kind in found if kind == "all-reduce"))) == {"f32[]"}
