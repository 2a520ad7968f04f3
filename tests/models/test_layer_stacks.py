"""Runs of equal layers, their flat names, and the scanned forward against the unrolled one."""

import jax
import numpy as np
import pytest
from flax import nnx

from tests.golden import weights
from v4jax import config
from v4jax.cache.allocate import contiguous_caches
from v4jax.checkpoint import param_mapping
from v4jax.core.errors import UserError
from v4jax.core.layer_spec import LayerSpec
from v4jax.models.layer_stacks import LayerStack, from_layer_dict, stacks, to_layer_dict

pytestmark = pytest.mark.slow

LONG = weights.config(
    layer_types=("swa", "swa", "csa", "hca", "csa", "hca"), moe=config.MoE(8, 2, 16, num_hash_layers=2)
)


def test_runs_of_the_released_schedules():
    flash, pro = config.load("v4_flash").model, config.load("v4_pro").model
    pair = (LayerSpec("hca", "moe"), LayerSpec("csa", "moe"))
    assert stacks(flash, True) == [
        LayerStack(0, (LayerSpec("swa", "hash_moe"),), 2),
        LayerStack(2, (LayerSpec("csa", "hash_moe"),), 1),
        LayerStack(3, pair, 20),
    ]
    assert stacks(pro, True) == [
        LayerStack(0, (LayerSpec("hca", "hash_moe"),), 2),
        LayerStack(2, (LayerSpec("csa", "hash_moe"),), 1),
        LayerStack(3, pair, 29),
    ]
    assert stacks(flash, False) == [LayerStack(i, (layer,), 1) for i, layer in enumerate(flash.layers)]


@pytest.mark.parametrize("schedule", ["s", "sc", "sscchh", "schchc", "chchsss", "cscscsh"])
@pytest.mark.parametrize("num_hash_layers", [0, 1])
def test_runs_cover_the_schedule_in_order(schedule, num_hash_layers):
    kinds = tuple({"s": "swa", "c": "csa", "h": "hca"}[letter] for letter in schedule)
    model = weights.config(layer_types=kinds, moe=config.MoE(8, 2, 16, num_hash_layers=num_hash_layers))
    for scan in (True, False):
        covered = [
            (run.layer(position, repeat), layer)
            for run in stacks(model, scan)
            for repeat in range(run.repeats)
            for position, layer in enumerate(run.pattern)
        ]
        assert covered == list(enumerate(model.layers))


@pytest.mark.parametrize("scan", [False, True])
def test_flat_names_are_those_of_checkpoints_and_come_back(scan):
    model = weights.config(layer_types=LONG.layer_types, moe=LONG.moe, num_nextn_predict_layers=1)
    flat = weights.random_flat(model, 0)
    net = weights.build(model, flat, scan)
    assert (len(net.stack_specs) < len(model.layer_types)) == scan
    back = to_layer_dict(nnx.state(net), net.stack_specs)
    assert set(back) == set(param_mapping.tensors(model)) == set(flat)
    for name, array in back.items():
        np.testing.assert_array_equal(array, flat[name], err_msg=name)
    again = from_layer_dict(back, nnx.state(net), net.stack_specs)
    jax.tree.map(np.testing.assert_array_equal, again, nnx.state(net))


@pytest.mark.parametrize(
    "name, scan", [("layers.0.attn.sink", False), ("layers.1.attn.sink", True), ("norm.scale", True)]
)
def test_a_missing_name_is_one_clear_line(name, scan):
    model = weights.config(layer_types=("swa", "swa"), moe=config.MoE(8, 2, 16, num_hash_layers=0))
    flat = weights.random_flat(model, 0)
    del flat[name]
    with pytest.raises(UserError, match=f"^parameter {name} is missing; give all parameters of this very model$"):
        weights.build(model, flat, scan)


def test_scanned_layers_equal_unrolled_ones():
    flat, ids = weights.random_flat(LONG, 0), weights.tokens(LONG, (2, 37))
    plain, scanned = weights.build(LONG, flat), weights.build(LONG, flat, scan=True)
    assert [run.repeats for run in scanned.stack_specs] == [2, 2]
    (want, x, aux), (got, y, aux_scanned) = weights.full(plain, ids), weights.full(scanned, ids)
    spread = float(np.std(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * spread)
    np.testing.assert_allclose(y, x, rtol=0, atol=2e-5 * float(np.std(x)))
    for name in aux:
        np.testing.assert_allclose(aux_scanned[name], aux[name], rtol=1e-4, atol=1e-6, err_msg=name)
    state, seen, parts = contiguous_caches(scanned, 2, 37), np.zeros(2, np.int32), []
    for start in range(0, 33, 11):
        logits, _, state = weights.step(scanned, ids[:, start : start + 11], seen + start, None, state)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), want[:, :33], rtol=0, atol=2e-5 * spread)
