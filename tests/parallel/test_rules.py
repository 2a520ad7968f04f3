"""Rules: what they split, what they refuse, and that no preset's shardings drift unseen."""

import dataclasses
import json

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.golden import shardings
from v4jax import config
from v4jax.config import ConfigError, Mesh, ShardingRules
from v4jax.core.errors import UserError
from v4jax.nn.linear import normal_param
from v4jax.parallel.mesh import make_mesh, sizes
from v4jax.parallel.rules import MeshRules, constrain, make_mesh_rules, use_rules, validate_rules, validate_used

FSDP = config.load_sharding("fsdp")


def test_golden_shardings():
    """`python -m tests.golden shardings` writes them anew."""
    assert shardings.tables() == json.loads(shardings.PATH.read_text(encoding="utf-8"))


def test_letters_survive_vmap_scan_grad_and_eval_shape():
    seen = []

    def through(key):
        build = lambda key: normal_param(nnx.Rngs(key), "DQ", (4, 2), 1.0)
        stacked = jax.vmap(build)(jax.random.split(key, 3))
        seen.append((stacked.letters, stacked[...].shape))
        seen.append(jax.jit(build)(key).letters)
        seen.append(jax.grad(lambda p: p[...].sum())(build(key)).letters)
        jax.lax.scan(lambda carry, p: (carry, seen.append(p.letters)), 0, stacked)
        return stacked

    assert jax.eval_shape(through, jax.random.key(0)).letters == "DQ"
    assert seen == [("DQ", (3, 4, 2)), "DQ", "DQ", "DQ"]


def test_a_mesh_fills_up_and_says_what_does_not_fit():
    assert sizes(Mesh("fsdp", data=2), FSDP, 8) == (1, 2, 4, 1, 1, 1)
    assert sizes(Mesh("fsdp", data=2, fsdp=4), FSDP, 8) == (1, 2, 4, 1, 1, 1)
    with pytest.raises(UserError, match="8 devices cannot be split by mesh.data=3"):
        sizes(Mesh("fsdp", data=3), FSDP, 8)
    with pytest.raises(UserError, match="make 4 devices, but there are 8; leave mesh.fsdp at 1"):
        sizes(Mesh("fsdp", data=2, fsdp=2), FSDP, 8)
    assert make_mesh(Mesh("data"), config.load_sharding("data")).shape["data"] == 8


def test_specs_of_weights_and_activations():
    sharding = make_mesh_rules(Mesh("pod", expert=2, tensor=2))
    assert sharding.weight("EUDF") == P("expert", None, "fsdp", "tensor")
    assert sharding.weight("DQ") == P(("fsdp", "expert"), None)
    assert sharding.weight("QNH") == P("fsdp", "tensor", "expert")
    assert sharding.weight("D") == P()
    assert sharding.activation("BTXD") == P(("fsdp", "expert"), None, None, None)
    assert make_mesh_rules(Mesh()) is None


def test_constrain_follows_the_rules_in_force_only():
    sharding, x = make_mesh_rules(Mesh("data")), jax.numpy.zeros((8, 4))
    assert constrain(x, "BT") is x

    def inside(x):
        with use_rules(sharding):
            return constrain(x, "BT")

    assert jax.jit(inside)(x).sharding.is_equivalent_to(sharding.named(P("data", None)), 2)
    assert constrain(x, "BT") is x


@pytest.mark.parametrize(
    "layout, message",
    [
        (ShardingRules("l", "data", weights=(("hidden", ("data",)),)), "'hidden' follows no logical axis"),
        (ShardingRules("l", "data", weights=(("embed", ("model",)),)), "names the mesh axis 'model'"),
        (ShardingRules("l", "data", weights=(("embed", ("fsdp", "fsdp")),)), "needs mesh axes, each once"),
        (ShardingRules("l", "data", weights=(("embed", ("fsdp",)), ("embed", ("data",)))), "is given twice"),
        (
            ShardingRules("l", "data", activations=(("batch", ("data",)), ("token", ("data",)))),
            "'data' splits two axes",
        ),
        (ShardingRules("l", "rows"), "fill is 'rows'"),
    ],
)
def test_rules_without_meaning_are_errors(layout, message):
    with pytest.raises(UserError, match=message):
        validate_rules(layout)


def test_clashes_and_unused_rules_are_errors():
    with pytest.raises(UserError, match="'fsdp' splits both 'embed' and 'q_lora_rank' of a parameter DQ"):
        validate_used(ShardingRules("l", "fsdp", weights=(("embed", ("fsdp",)), ("q_lora_rank", ("fsdp",)))), ["DQ"])
    with pytest.raises(UserError, match="no parameter of this model follows the rule 'index_heads'"):
        validate_used(ShardingRules("l", "tensor", weights=(("index_heads", ("tensor",)),)), ["DQ", "D"])
    with pytest.raises(UserError, match="mesh.tensor is 2, but no rule of 'fsdp' uses it"):
        make_mesh_rules(Mesh("fsdp", tensor=2))


def test_a_size_that_devices_do_not_divide_is_named():
    sharding = MeshRules(make_mesh_rules(Mesh("fsdp")).mesh, FSDP)
    with pytest.raises(UserError, match="layers.0.attn.q_down: its axis 'embed' of 12 is not a multiple of mesh.fsdp"):
        sharding.parameters({"layers.0.attn.q_down": "DQ"}, {"layers.0.attn.q_down": (12, 8)})
    assert sharding.parameters({"s": "DQ"}, {"s": (3, 16, 8)})["s"].spec == P(None, "fsdp", None)


def test_axes_without_a_layout_and_unknown_layouts_are_refused():
    tiny = config.load("tiny")
    with pytest.raises(ConfigError, match="mesh.fsdp is 2, but mesh.rules is empty"):
        config.validate(dataclasses.replace(tiny, mesh=Mesh(fsdp=2)))
    with pytest.raises(ConfigError, match="no sharding 'fspd'; did you mean 'fsdp'"):
        make_mesh_rules(Mesh("fspd"))
