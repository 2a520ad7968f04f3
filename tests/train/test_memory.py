"""State that is offloaded to host memory is stored in host memory, and changes no number."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from tests.parallel.test_training import batches, small
from v4jax.checkpoint.orbax import TrainCheckpointer
from v4jax.config import Mesh, validate
from v4jax.core.errors import UserError
from v4jax.train.trainer import Trainer

pytestmark = pytest.mark.slow

MESH = Mesh(rules="fsdp")


def run(**train):
    """The last state of three steps on two devices, the losses, a trainer, and the compiled step's text."""
    config = validate(small(MESH, scan=True, remat=True, **train))
    model = dataclasses.replace(config.model, layer_types=("swa", "swa"))
    optimizer = optax.sgd(0.1, momentum=0.9)  # Muon takes long to compile
    trainer = Trainer(dataclasses.replace(config, model=model), optimizer, jax.devices()[:2])
    state, losses, rows = trainer.init(), [], [trainer.shard_batch(batch) for batch in batches(config)[:3]]
    lowered = trainer.step.lower(state, rows[0])
    step = lowered.compile()
    for batch in rows:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return trainer, state, losses, lowered.as_text()


def test_optimizer_and_streams_in_host_memory_give_the_same_losses_bit_for_bit(tmp_path):
    _, plain, wanted, text = run()
    assert "pinned_host" not in text
    trainer, state, losses, text = run(offload=("optimizer", "streams"))
    assert losses == wanted
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(plain))
    # Streams: the forward scan sends each layer's to the host, the backward scan fetches it.
    assert text.count("annotate_device_placement") >= 2 and '"pinned_host"' in text
    kinds = lambda tree: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}
    default = jax.devices()[0].default_memory().kind
    assert kinds(state.opt) == {"pinned_host"} and kinds(state.params) == {default} != {"pinned_host"}
    with TrainCheckpointer(tmp_path, trainer.config, keep=1) as store:
        store.save(3, trainer.to_tree(state), {})
        store.wait()
        restored, _ = store.restore(3, {"opt": trainer.abstract_tree()["opt"]})
    assert kinds(restored["opt"]) == {"pinned_host"}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored["opt"]), jax.device_get(state.opt))


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"offload": ("weights",)}, "train.offload is 'weights'; one of optimizer, streams"),
        ({"offload": ("streams",)}, "set train.remat=true too"),
    ],
)
def test_what_cannot_be_offloaded_is_said(change, complaint):
    with pytest.raises(UserError, match=complaint):
        validate(small(MESH, **change))
    with pytest.raises(UserError, match="mesh.rules=fsdp"):
        validate(small(offload=("optimizer",)))
