"""Checksums: every damage of an array is named, whatever is read of it; everything else reads as before."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.checkpoint import bit_flips
from v4jax.checkpoint import checksums, load_config
from v4jax.checkpoint.convert import convert
from v4jax.checkpoint.orbax import TrainCheckpointer
from v4jax.checkpoint.safetensors import SafetensorsDir
from v4jax.checkpoint.step import StepItem, read_sums
from v4jax.core.errors import UserError


def _damage_chunk(item) -> None:
    """Flip a bit of stored data, in the file that holds the most of it."""
    file = max(item.rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["run", "orbax", "huggingface"])
def test_bit_flips_are_harmless_or_named(tmp_path, kind):
    bit_flips.make(kind, tmp_path / "m")
    seen = bit_flips.survey(kind, tmp_path / "m", flips=30, seed=0)
    assert any(result == "refused" for _, result in seen)


@pytest.mark.parametrize("steps", [(10, 20), (20,)])
def test_a_damaged_array_is_named_with_its_file_and_the_way_back(tmp_path, steps):
    rng = np.random.default_rng(0)
    tree = {"opt": {"mu": jax.numpy.asarray(rng.standard_normal((300, 50), np.float32)), "nu": jax.numpy.ones(3)}}
    with TrainCheckpointer(tmp_path, bit_flips.config(), keep=2) as store:
        for step in steps:
            store.save(step, tree, {})
        store.wait()
        _damage_chunk(tmp_path / "checkpoints" / "20" / "opt")
        with pytest.raises(UserError, match=r"checkpoints/20 is damaged \(opt: mu .*in .*process_0/d/\w+\)") as caught:
            store.restore(20, tree)
        assert ("to go back to step 10" in str(caught.value)) == (10 in steps)
        if 10 in steps:
            assert np.array_equal(store.restore(10, tree)[0]["opt"]["mu"], tree["opt"]["mu"])


def test_shards_verify_what_they_read(tmp_path):
    """Saved in 8 shards, read in others: a region reads the parts that cover it, and damage outside is not seen."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    value = np.arange(64 * 6, dtype=np.float32).reshape(64, 6)
    with TrainCheckpointer(tmp_path, bit_flips.config(), keep=1) as store:
        store.save(1, {"model": {"a": jax.device_put(value, place("x", "y")), "b": jax.numpy.ones(2)}}, {})
        store.wait()
        sums = json.loads((tmp_path / "checkpoints" / "1" / "checksums" / "0.json").read_text())
        assert sums["arrays"]["model"]["a"][0] == [16, 3] and len(sums["arrays"]["model"]["a"][1]) == 8
        item = StepItem(tmp_path / "checkpoints" / "1", "model", read_sums(tmp_path / "checkpoints" / "1"))
        for index in [(slice(None), slice(2, 4)), (5,), (slice(17, 18), slice(0, 1)), (), (slice(15, 17), 3)]:
            assert np.array_equal(item.read("a", index), value[index])
        wrong = dict(sums["arrays"]["model"]["a"][1], **{"3.1": "0" * 16})
        sums["arrays"]["model"]["a"][1] = wrong
        (tmp_path / "checkpoints" / "1" / "checksums" / "0.json").write_text(json.dumps(sums))
        item = StepItem(tmp_path / "checkpoints" / "1", "model", read_sums(tmp_path / "checkpoints" / "1"))
        assert np.array_equal(item.read("a", (slice(0, 48),)), value[:48])
        with pytest.raises(UserError, match="model: a differs from its checksum"):
            item.read("a", (slice(47, 49), slice(3, 4)))


def test_checksums_that_are_gone_are_missed(tmp_path):
    bit_flips.make("orbax", tmp_path / "m")
    file = tmp_path / "m" / "checkpoints" / "0" / "checksums" / "0.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"processes": 2}))
    with pytest.raises(UserError, match=r"damaged \(checksums/ is incomplete or unreadable \(No such file"):
        bit_flips.read("orbax", tmp_path / "m")
    values["arrays"]["model"].pop("embed.table")
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="model: embed.table has no checksum"):
        bit_flips.read("orbax", tmp_path / "m")


@pytest.mark.parametrize("kind", ["orbax", "huggingface"])
def test_convert_takes_a_damaged_source_if_told(tmp_path, kind):
    """One element of one tensor is another number, without which the checkpoint reads well."""
    bit_flips.make(kind, tmp_path / "m")
    expected = bit_flips.read(kind, tmp_path / "m")[1]
    if kind == "orbax":  # a flip inside compressed data would change many elements, so the checksum is what changes
        file = tmp_path / "m" / "checkpoints" / "0" / "checksums" / "0.json"
        values = json.loads(file.read_text())
        values["arrays"]["model"]["head.weight"][1] = {"0.0": "0" * 16}
        file.write_text(json.dumps(values))
    else:
        file = tmp_path / "m" / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[SafetensorsDir(file).info("head.weight").start] ^= 1
        file.write_bytes(content)
    named = {
        "orbax": r"checkpoints/0 is damaged \(model: head.weight differs .*, in .*process_0/d/\w+\)",
        "huggingface": r"m/model.safetensors holds 'head.weight', which differs from its checksum; the file is damaged",
    }
    with pytest.raises(UserError, match=named[kind]):
        convert(tmp_path / "m", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    convert(tmp_path / "m", tmp_path / "other", verify=False)
    found = bit_flips.read("orbax" if kind == "huggingface" else "huggingface", tmp_path / "other")[1]
    assert [name for name in expected if found[name] != expected[name]] == ["head.weight"] * (kind == "huggingface")


def test_a_safetensors_file_of_another_program_has_no_checksums_and_loads(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="the safetensors library is the other program")
    bit_flips.make("huggingface", tmp_path / "m")
    expected = bit_flips.read("huggingface", tmp_path / "m")
    tensors = library.load_file(tmp_path / "m" / "model.safetensors")
    store = SafetensorsDir(tmp_path / "m")
    assert all(store.info(name).digest == checksums.digest(array) for name, array in tensors.items())
    library.save_file(tensors, tmp_path / "m" / "model.safetensors")
    assert SafetensorsDir(tmp_path / "m").info("embed.weight").digest is None
    assert bit_flips.read("huggingface", tmp_path / "m") == expected


def test_edited_config_is_said_once_and_taken(tmp_path, caplog):
    for kind, name, old, new in [
        ("huggingface", "config.json", '"rope_theta": 10000', '"rope_theta": 20000'),
        ("orbax", "v4jax.json", '"rope_theta": 10000', '"rope_theta": 20000'),
    ]:
        bit_flips.make(kind, tmp_path / kind)
        file = tmp_path / kind / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
        caplog.clear()
        for _ in range(2):
            bit_flips.read(kind, tmp_path / kind)
        assert [record.message for record in caplog.records] == [
            f"{file} is not as v4jax wrote it: if no user edited it, it is damaged; copy it again"
        ]
        assert load_config(tmp_path / kind).model.rope.rope_theta == 20000
