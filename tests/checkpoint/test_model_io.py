"""load and save: bit-exact between files, both formats, both layouts and shards; one clear line for what is wrong."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import v4jax
from v4jax import checkpoint
from v4jax.checkpoint import export, hf, param_mapping
from v4jax.checkpoint import safetensors as st
from v4jax.checkpoint.lazy_tensors import LazyTensors
from v4jax.checkpoint.model_io import ModelTensors
from v4jax.config import Config, Data, MoE, Serve
from v4jax.core.errors import UserError
from v4jax.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture
def longer(tiny):
    """A model whose layers stack: runs of one and of two kinds, MTP, one layer outside of any run."""
    return dataclasses.replace(
        tiny,
        layer_types=("swa", "csa", "hca", "csa", "hca"),
        moe=MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, num_hash_layers=1),
    )


@pytest.fixture
def hf_dir(tmp_path, longer, random_flat):
    """Function (dtype) -> a Hugging Face directory with random weights and a tokenizer."""

    def make(dtype):
        model = dataclasses.replace(longer, dtype=np.dtype(dtype).name)
        hf.write_hf(tmp_path / "hf", model, random_flat(model, dtype), max_shard_bytes=100_000)
        Tokenizer().save(tmp_path / "hf")
        return tmp_path / "hf"

    return make


def _files(path):
    return {file: (path / file).read_bytes() for file in sorted(os.listdir(path))}


@pytest.mark.parametrize("scan", [False, True])
def test_files_to_model_to_files_is_exact(tmp_path, hf_dir, same_bits, weights, scan):
    source = hf_dir(weights)
    model = v4jax.load(source, scan=scan)
    assert model.config == hf.read_hf(source)[0] and model.config.dtype == weights.name
    assert (len(model.stack_specs) < model.config.num_hidden_layers) == scan
    v4jax.save(model, tmp_path / "orbax", format="orbax")
    v4jax.save(model, tmp_path / "again", tokenizer=source)
    for path in (tmp_path / "orbax", tmp_path / "again"):
        back = v4jax.load(path, scan=not scan)
        assert back.config == model.config
        same_bits(ModelTensors(back), hf.read_hf(source)[1])
    found, wanted = st.SafetensorsDir(tmp_path / "again"), st.SafetensorsDir(source)
    assert set(found.names()) == set(wanted.names())
    for name in found.names():
        assert found.read(name).tobytes() == wanted.read(name).tobytes(), name
    assert (tmp_path / "again" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("format", ["huggingface", "orbax"])
def test_types_follow_the_roles(tmp_path, hf_dir, format):
    v4jax.save(v4jax.load(hf_dir(np.float32)), tmp_path / "m", format=format)
    exact, narrow = v4jax.load(tmp_path / "m"), v4jax.load(tmp_path / "m", dtype="bfloat16")
    assert (exact.config.dtype, narrow.config.dtype) == ("float32", "bfloat16")
    before, after = ModelTensors(exact), ModelTensors(narrow)
    for name, tensor in param_mapping.tensors(exact.config).items():
        wanted = before[name].astype(ml_dtypes.bfloat16) if tensor.role == "matrix" else before[name]
        assert after[name].dtype == wanted.dtype and np.array_equal(after[name], wanted), name
    v4jax.save(narrow, tmp_path / "n", format=format)
    wide = v4jax.load(tmp_path / "n", dtype="float32")
    assert wide.config.dtype == "float32"
    assert {array.dtype.name for array in jax.tree.leaves(nnx.state(wide))} == {"float32", "int32"}
    with pytest.raises(UserError, match="a model cannot be 'float16'; choose float32 or bfloat16"):
        v4jax.load(tmp_path / "m", dtype="float16")


@pytest.mark.parametrize("format", ["huggingface", "orbax"])
@pytest.mark.parametrize("scan", [False, True])
def test_shards_are_read_where_they_go(tmp_path, hf_dir, same_bits, format, scan):
    source = hf_dir(ml_dtypes.bfloat16)
    if format == "orbax":
        v4jax.save(v4jax.load(source), tmp_path / "m", format=format)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    axes = {"E": "x", "V": "x", "F": "y", "N": "y", "*": None}
    seen = {}

    def placement(letters, shape):
        assert len(letters) == len(shape)
        seen[letters] = shape
        return NamedSharding(mesh, PartitionSpec(*(axes.get(letter) for letter in letters)))

    model = v4jax.load(tmp_path / "m" if format == "orbax" else source, scan=scan, placement=placement)
    assert seen["VD"] == (128, 64) and ("*EUDF" in seen) == scan
    experts = next(v for path, v in nnx.to_flat_state(nnx.state(model)) if "experts" in path)[...]
    assert len(experts.sharding.device_set) == 8
    assert experts.addressable_shards[0].data.size == experts.size // 8
    same_bits(ModelTensors(model), hf.read_hf(source)[1])
    v4jax.save(model, tmp_path / "back", format=format)
    same_bits(ModelTensors(v4jax.load(tmp_path / "back")), hf.read_hf(source)[1])


def test_one_array_at_a_time(tmp_path, tiny, random_flat, monkeypatch):
    """Of the tensors on their way to disk, those of two batches are in memory at most."""
    model = dataclasses.replace(tiny, layer_types=("swa",), num_nextn_predict_layers=0)
    flat = random_flat(model, np.float32)
    born, most = [], []

    class Counted(np.ndarray):
        pass

    class Source(LazyTensors):
        def dtype(self, name):
            return flat[name].dtype

        def read(self, name, leading=slice(None)):
            array = flat[name][leading].copy().view(Counted)
            born.append(weakref.ref(array))
            most.append(sum(ref() is not None for ref in born))
            return array

    monkeypatch.setattr(export, "_BATCH_BYTES", 1)
    config = Config(model=model, data=Data(seq_len=64), serve=Serve(max_model_len=512))
    export.write_orbax(tmp_path / "m", config, Source(param_mapping.tensors(model)))
    assert len(most) == len(flat) and max(most) <= 2
    assert np.array_equal(ModelTensors(v4jax.load(tmp_path / "m"))["head.weight"], flat["head.weight"])


def test_a_run_is_a_checkpoint(tmp_path, longer, random_flat, same_bits):
    """The workdir itself loads: weights of the newest step, config and tokenizer."""
    config = Config(
        "run", dataclasses.replace(longer, dtype="float32"), Data(seq_len=64), serve=Serve(max_model_len=256)
    )
    flat = random_flat(longer, np.float32)
    older = {name: array * 0 for name, array in flat.items()}
    with checkpoint.TrainCheckpointer(tmp_path, config, Tokenizer(), keep=2) as store:
        with pytest.raises(UserError, match="has no finished checkpoint; train until the first one is saved"):
            v4jax.load(tmp_path)
        for step, arrays in ((3, older), (12, flat)):
            tree = {"model": jax.tree.map(jnp.asarray, arrays), "opt": [jnp.ones(3)], "step": jnp.int32(step)}
            store.save(step, tree, {"data": {}})
    same_bits(ModelTensors(v4jax.load(tmp_path)), flat)
    assert checkpoint.load_config(tmp_path) == config
    assert load_tokenizer(tmp_path, config.model).encode("To be") == Tokenizer().encode("To be")


@pytest.mark.parametrize("shared", [0, 2])
def test_any_number_of_shared_experts_is_saved_and_read(tmp_path, tiny, random_flat, same_bits, shared):
    """Without shared experts their arrays have no elements, and orbax cannot store those."""
    moe = dataclasses.replace(tiny.moe, n_shared_experts=shared)
    model = dataclasses.replace(tiny, moe=moe, dtype="float32", layer_types=("swa",), num_nextn_predict_layers=0)
    config, flat = (
        Config("run", model, Data(seq_len=64), serve=Serve(max_model_len=256)),
        random_flat(model, np.float32),
    )
    assert flat["layers.0.ffn.shared.down"].shape == (32 * shared, 64)
    with checkpoint.TrainCheckpointer(tmp_path / "run", config, Tokenizer(), keep=2) as store:
        store.save(1, {"model": jax.tree.map(jnp.asarray, flat)}, {})
        store.wait()
        found = store.restore(1, {"model": jax.tree.map(jnp.asarray, flat)})[0]["model"]
        same_bits({name: found[name] for name in flat}, flat)
    v4jax.save(v4jax.load(tmp_path / "run"), tmp_path / "exported", format="orbax")
    for path in ("run", "exported"):
        same_bits(ModelTensors(v4jax.load(tmp_path / path)), flat)


def test_tokenizers_travel(tmp_path, hf_dir):
    source = hf_dir(np.float32)
    model = v4jax.load(source)
    for number, (format, tokenizer) in enumerate([("orbax", Tokenizer()), ("huggingface", source)]):
        v4jax.save(model, tmp_path / str(number), format=format, tokenizer=tokenizer)
        found = load_tokenizer(tmp_path / str(number), model.config)
        assert (found.encode("thou art"), found.eos_id) == (Tokenizer().encode("thou art"), 1)
    (tmp_path / "0" / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path / "0", model.config).bos_id == model.config.bos_id
    v4jax.save(model, tmp_path / "none")
    assert load_tokenizer(tmp_path / "none", model.config) is None


def test_config_of_a_bare_model(tmp_path, hf_dir):
    source = hf_dir(np.float32)
    config = checkpoint.load_config(source)
    assert (config.name, config.model, config.serve.max_model_len) == ("hf", hf.read_hf(source)[0], 512)
    given = Config("mine", data=Data(seq_len=96, source="needle"), serve=Serve(max_model_len=128))
    v4jax.save(v4jax.load(source), tmp_path / "m", format="orbax", config=given)
    assert checkpoint.load_config(tmp_path / "m") == dataclasses.replace(given, model=config.model)


# --- what users get wrong ----------------------------------------------------------------------------------------


def _edit(path, **changes):
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | changes))


@pytest.mark.parametrize("name", ["deepseek_v41", "deepseek_v3", "llama"])
def test_another_architecture_is_named(hf_dir, name):
    path = hf_dir(np.float32)
    _edit(path, model_type=name)
    with pytest.raises(UserError, match=f"model_type is '{name}'; v4jax reads 'deepseek_v4' only"):
        v4jax.load(path)


def test_damaged_hugging_face_directories(hf_dir):
    path = hf_dir(np.float32)
    shard = next(path.glob("model-00002*"))
    backup = shard.read_bytes()
    shard.write_bytes(backup[:-100])
    with pytest.raises(UserError, match=f"{shard.name} is truncated"):
        v4jax.load(path)
    shard.unlink()
    with pytest.raises(UserError, match=f"names the shard {shard.name}, which is missing"):
        v4jax.load(path)
    shard.write_bytes(backup)
    _edit(path, hidden_size=128)
    with pytest.raises(UserError, match="does not fit its config.json: wrong: "):
        v4jax.load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        v4jax.load(path)


def test_damaged_orbax_directories(tmp_path, hf_dir):
    v4jax.save(v4jax.load(hf_dir(np.float32)), tmp_path / "m", format="orbax")
    step = tmp_path / "m" / "checkpoints" / "0"
    largest = max(step.rglob("d/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    said = "checkpoints/0 is damaged .*; there is no earlier step; copy it again"
    with pytest.raises(UserError, match=said) as error:
        v4jax.load(tmp_path / "m")
    assert "\n" not in str(error.value)
    shutil.rmtree(step / "model")
    with pytest.raises(UserError, match="checkpoints/0 is damaged"):
        v4jax.load(tmp_path / "m")
    values = json.loads((tmp_path / "m" / "v4jax.json").read_text())
    values["config"]["model"]["dtype"] = "float64"
    (tmp_path / "m" / "v4jax.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="v4jax.json: model.dtype is 'float64'; one of bfloat16, float32"):
        v4jax.load(tmp_path / "m")


@pytest.mark.parametrize("format", ["huggingface", "orbax"])
def test_targets_that_are_something_else(tmp_path, hf_dir, build, longer, random_flat, format):
    model = build(longer, random_flat(longer, np.float32))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="d exists and is no model directory"):
        v4jax.save(model, tmp_path / "d", format=format)
    other = {"huggingface": "orbax", "orbax": "huggingface"}[format]
    v4jax.save(model, tmp_path / "m", format=other)
    with pytest.raises(UserError, match="m exists and is no model directory"):
        v4jax.save(model, tmp_path / "m", format=format)
    v4jax.save(model, tmp_path / "m", format=other)  # its own kind is replaced
    with pytest.raises(UserError, match="no format 'orbac'; did you mean 'orbax'"):
        v4jax.save(model, tmp_path / "x", format="orbac")
    assert sorted(os.listdir(tmp_path)) == ["d", "m"]


def test_a_run_is_never_replaced(tmp_path, longer, random_flat, build):
    config = Config("run", longer, Data(seq_len=64), serve=Serve(max_model_len=256))
    with checkpoint.TrainCheckpointer(tmp_path / "run", config, keep=1) as store:
        store.save(1, {"model": {"a": jnp.ones(2)}, "opt": jnp.ones(2)}, {})
    with pytest.raises(UserError, match="run is a training run; choose an empty or a new directory"):
        v4jax.save(build(longer, random_flat(longer, np.float32)), tmp_path / "run", format="orbax")


def test_import_stays_light():
    code = "import sys, v4jax, v4jax.checkpoint; assert not {'jax', 'orbax', 'numpy'} & set(sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
