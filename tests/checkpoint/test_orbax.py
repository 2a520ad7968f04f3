"""Checkpoints of a run: exact, atomic under SIGKILL and a full disk, and clear about damage."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from v4jax.checkpoint import TrainCheckpointer, load_config, model_io
from v4jax.checkpoint.orbax import OrbaxTensors, finished_steps
from v4jax.config import Config, Data, Model, Serve
from v4jax.core.errors import UserError
from v4jax.models.layer_stacks import from_layer_dict, to_layer_dict


@pytest.fixture
def config(tiny) -> Config:
    """A valid config around the tiny model."""
    model = dataclasses.replace(tiny, dtype="float32")
    return Config("test", model, data=Data(seq_len=64), serve=Serve(max_model_len=512))


class Moments(NamedTuple):
    """An optimizer state as optax has them."""

    count: jax.Array
    mu: Any
    rest: tuple


def _tree(value: float = 1.0) -> dict:
    """A small state with every kind of node and of type."""
    big = value * jnp.arange(50_000, dtype=jnp.float32)
    opt = (Moments(jnp.int32(3), {"a.b": jnp.full((3, 2), value, jnp.bfloat16)}, ()), None, [jnp.ones((2, 2))])
    return {"model": {"embed.table": big, "norm.scale": jnp.ones(4)}, "opt": opt, "step": jnp.uint32(value)}


def _same(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


@pytest.fixture
def saved(tmp_path, config):
    """A run with the finished steps 1 and 2."""
    with TrainCheckpointer(tmp_path / "run", config, keep=2) as store:
        for step in (1, 2):
            store.save(step, _tree(step), {"step": step})
            store.wait()
    return tmp_path / "run"


def test_state_comes_back_exactly(tmp_path, config):
    extras = {"data": {"next": 17, "seed": 2**63 + 1}, "losses": [0.1, 1e-30], "none": None}
    tree = _tree()
    with TrainCheckpointer(tmp_path / "a run %20", config, keep=2) as store, jax.transfer_guard("disallow"):
        assert store.latest() is None
        store.save(7, tree, extras)
    with TrainCheckpointer(tmp_path / "a run %20", config, keep=2) as store:
        tree, found = store.restore(store.latest(), _abstract(_tree()))
    _same(tree, _tree())
    assert found == extras
    assert load_config(tmp_path / "a run %20") == config


def test_the_newest_are_kept(tmp_path, config):
    with TrainCheckpointer(tmp_path, config, keep=2) as store:
        for step in (10, 20, 30):
            store.save(step, _tree(step), {})
        store.save(30, _tree(99), {})  # saved already
        store.wait()
        assert store.latest() == 30
        _same(store.restore(30, _abstract(_tree()))[0], _tree(30))
        _same(store.restore(20, {"step": jnp.uint32(0)})[0], {"step": jnp.uint32(20)})  # one item alone
        with pytest.raises(UserError, match=r"no finished checkpoint of step 10; finished: \[20, 30\]"):
            store.restore(10, _abstract(_tree()))
    assert finished_steps(tmp_path) == [20, 30]


def test_arrays_may_be_donated_at_once(tmp_path, config):
    """Saving goes on in the background while the next step overwrites its inputs, and after a restore as well."""
    change = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)
    x = {"embed.table": jnp.zeros((2000, 500))}
    with TrainCheckpointer(tmp_path, config, keep=9) as store:
        for step in (1, 2):
            store.save(step, {"model": x}, {})
            for _ in range(3):
                x = change(x)
        store.wait()
        for step, value in ((1, 0), (2, 3)):
            x = store.restore(step, {"model": _abstract(x)})[0]["model"]
            assert np.all(np.asarray(x["embed.table"]) == value)
            assert np.all(np.asarray(change(x)["embed.table"]) == value + 1)


def test_layers_stacked_or_not_share_a_checkpoint(tmp_path, config, build, random_flat):
    model = dataclasses.replace(
        config.model, layer_types=("swa", "csa", "hca", "csa", "hca"), num_nextn_predict_layers=0
    )
    config = dataclasses.replace(config, model=model)
    stacked = build(model, random_flat(model, np.float32), scan=True)
    assert len(stacked.stack_specs) < model.num_hidden_layers
    flat = jax.jit(lambda state: to_layer_dict(state, stacked.stack_specs))(nnx.state(stacked))
    with TrainCheckpointer(tmp_path, config, keep=1) as store:
        with pytest.raises(ValueError, match="layer_stacks.to_layer_dict"):
            store.save(1, {"model": {"stacks.0.0.attn.kv": flat["embed.table"]}}, {})
        store.save(1, {"model": flat}, {})
        store.wait()
        for scan in (False, True):
            _, state, runs = model_io.abstract_model(model, scan)
            there_and_back = lambda flat, state=state, runs=runs: to_layer_dict(
                from_layer_dict(flat, state, runs), runs
            )
            found = store.restore(1, {"model": jax.eval_shape(there_and_back, flat)})[0]["model"]
            _same(jax.jit(there_and_back)(found), flat)


def test_shards_go_where_they_are_wanted(tmp_path, config):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    value = np.arange(64 * 6, dtype=np.float32).reshape(64, 6)
    with TrainCheckpointer(tmp_path, config, keep=1) as store:
        store.save(1, {"model": {"a": jax.device_put(value, place("x", "y"))}}, {})
        store.wait()
        for spec in (("y",), (None, "y"), (), (("x", "y"),)):
            wanted = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=place(*spec))
            found = store.restore(1, {"model": {"a": wanted}})[0]["model"]["a"]
            assert found.sharding == place(*spec) and np.array_equal(found, value)


# --- interruptions -----------------------------------------------------------------------------------------------

_CHILD = """
import pathlib, sys
import jax.numpy as jnp
from v4jax.checkpoint import TrainCheckpointer, load_config
path = pathlib.Path(sys.argv[1])
with TrainCheckpointer(path, load_config(path), keep=2) as store:
    for step in range(100, 10_000):
        tree = {name: jnp.full((300, 1000), step, jnp.float32) for name in "abcd"}
        store.save(step, {"model": tree}, {"step": step})
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("delay", [0.0, 0.03])
def test_sigkill_leaves_a_good_checkpoint(tmp_path, config, delay):
    TrainCheckpointer(tmp_path, config, keep=2).close()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", _CHILD, tmp_path], env=env)
    try:
        while max(finished_steps(tmp_path), default=0) < 103:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    with TrainCheckpointer(tmp_path, config, keep=2) as store:
        step = store.latest()
        assert step >= 103
        leaf = jax.ShapeDtypeStruct((300, 1000), np.float32)
        tree, extras = store.restore(step, {"model": dict.fromkeys("abcd", leaf)})
        assert extras == {"step": step} and all(np.all(np.asarray(a) == step) for a in tree["model"].values())
        assert all(name.isdigit() for name in os.listdir(tmp_path / "checkpoints"))  # nothing half-written is left
        store.save(step + 1, {"model": tree["model"]}, {})
    assert finished_steps(tmp_path)[-1] == step + 1


@pytest.mark.parametrize("name", ["007", "\u00b2", "\u0663", "3.copy"])
def test_what_is_no_step_is_neither_read_nor_removed(saved, config, name):
    """A directory whose name is a number, but not as orbax writes it."""
    other = saved / "checkpoints" / name
    shutil.copytree(saved / "checkpoints/2", other)
    with TrainCheckpointer(saved, config, keep=2) as store:
        assert finished_steps(saved) == [1, 2] and store.latest() == 2
        store.save(3, _tree(3), {})
    assert finished_steps(saved) == [2, 3] and other.is_dir()


def test_an_unfinished_step_is_skipped_and_removed(saved, config):
    half = saved / "checkpoints" / "3"
    shutil.copytree(saved / "checkpoints" / "2", half)
    (half / "_CHECKPOINT_METADATA").unlink()
    shutil.copytree(half, saved / "checkpoints" / "4.orbax-checkpoint-tmp")
    assert finished_steps(saved) == [1, 2]
    with TrainCheckpointer(saved, config, keep=2) as store:
        assert store.latest() == 2
        assert sorted(os.listdir(saved / "checkpoints")) == ["1", "2"]
        store.save(3, _tree(3), {})
    assert finished_steps(saved) == [2, 3]


@pytest.fixture
def small_files():
    """Function (limit in bytes): a file that grows beyond it fails to be written, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_seen_before_writing(saved, config, monkeypatch, capfd):
    with TrainCheckpointer(saved, config, keep=1) as store:
        usage = shutil.disk_usage(saved)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=200_000))
        with pytest.raises(UserError, match="cannot write .*: No space left on device; .* are good") as error:
            store.save(3, _tree(3), {})
        assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")
        assert sorted(os.listdir(saved / "checkpoints")) == ["1", "2"]
        monkeypatch.undo()
        store.save(3, _tree(3), {})
    assert finished_steps(saved) == [3]


@pytest.mark.parametrize("limit", [20_000, 50, 1])
def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(saved, config, small_files, limit, capfd):
    """The error comes from save or wait, without orbax's log, and the store goes on."""
    noise = {"embed.table": jnp.asarray(np.random.default_rng(0).standard_normal(50_000, np.float32))}
    with TrainCheckpointer(saved, config, keep=1) as store:
        small_files(limit)
        with pytest.raises(UserError, match="cannot write .*checkpoints: File too large; free some space") as error:
            store.save(3, {"model": noise}, {"step": 3})
            store.wait()
        small_files(None)
        assert "\n" not in str(error.value) and "orbax" not in capfd.readouterr().err
        assert 2 in finished_steps(saved) and store.latest() == 2
        _same(store.restore(2, _abstract(_tree()))[0], _tree(2))
        assert sorted(os.listdir(saved / "checkpoints"))[-1] == "2"
        store.save(4, {"model": noise}, {"step": 4})
        store.wait()
        assert finished_steps(saved) == [4]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damage_is_named_or_harmless(tmp_path, saved, config, damage):
    """Whichever file of a finished step is hurt: a UserError that names the step, or the exact values."""
    step = saved / "checkpoints" / "2"
    names = [file.relative_to(step) for file in step.rglob("*") if file.is_file()]
    harmed = 0
    with TrainCheckpointer(saved, config, keep=2) as store:
        for name in names:
            if name == pathlib.Path("_CHECKPOINT_METADATA"):
                continue  # without it the step counts as unfinished, see above
            backup = (step / name).read_bytes()
            (step / name).unlink() if damage == "missing" else (step / name).write_bytes(backup[: len(backup) // 2])
            try:
                tree, extras = store.restore(2, _abstract(_tree()))
                _same(tree, _tree(2))
                assert extras == {"step": 2}
            except UserError as error:
                harmed += 1
                assert str(step) in str(error) and "is damaged" in str(error) and "\n" not in str(error)
            (step / name).write_bytes(backup)
        _same(store.restore(2, _abstract(_tree()))[0], _tree(2))
    assert harmed >= 8


# --- what does not fit -------------------------------------------------------------------------------------------


def test_another_tree_is_refused(saved, config):
    with TrainCheckpointer(saved, config, keep=2) as store:
        tree = _abstract(_tree())
        wrong = {**tree, "model": {"embed.table": jnp.zeros((5, 2)), "head.weight": jnp.zeros(2)}}
        with pytest.raises(
            UserError,
            match=r"missing: head.weight; unexpected: norm.scale; "
            r"wrong: embed.table float32\[50000\] instead of float32\[5, 2\]",
        ):
            store.restore(2, wrong)
        with pytest.raises(UserError, match="holds no 'ema'"):
            store.restore(2, {**tree, "ema": jnp.zeros(2)})
        with pytest.raises(UserError, match="wrong: value uint32"):
            store.restore(2, {**tree, "step": jnp.float32(0)})
        with pytest.raises(TypeError, match="not JSON serializable"):
            store.save(3, _tree(), {"a": object()})
        with pytest.raises(TypeError, match="put other values into the extras"):
            store.save(3, {"model": {}, "count": 3}, {})


def test_a_run_of_another_model_is_refused(saved, config):
    other = dataclasses.replace(config.model, indexer=dataclasses.replace(config.model.indexer, index_topk=4))
    before = (saved / "v4jax.json").read_text()
    with pytest.raises(UserError, match="holds a run with model.indexer.index_topk = 3, not 4; use its config"):
        TrainCheckpointer(saved, dataclasses.replace(config, model=other), keep=2)
    assert (saved / "v4jax.json").read_text() == before
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=123))
    TrainCheckpointer(saved, longer, keep=2).close()
    assert load_config(saved).train.steps == 123


def test_weights_of_another_model_are_refused(saved, config):
    with pytest.raises(UserError, match="does not fit the config: missing: head.weight, head_mhc.fn, .* and .* more"):
        OrbaxTensors(saved, config.model)
    with pytest.raises(UserError, match="has no finished checkpoint; train until"):
        OrbaxTensors(saved / "checkpoints", Model())


def test_a_place_that_cannot_be_written(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*; choose a directory that can be written"):
        TrainCheckpointer(tmp_path / "file" / "run", config, keep=2)


def test_commits_are_recorded_by_orbax(saved):
    """What tells a finished step is orbax's own record, so a version that drops it must not pass unnoticed."""
    record = json.loads((saved / "checkpoints" / "2" / "_CHECKPOINT_METADATA").read_bytes())
    assert record["commit_timestamp_nsecs"] > record["init_timestamp_nsecs"]
