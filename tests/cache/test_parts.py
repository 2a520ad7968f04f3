"""Parts of a block, on the meshes that eight devices allow."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.cache.block_fixtures import BLOCK, RECORD, item, name, payload
from v4jax.cache.offload.disk_tier import DiskTier
from v4jax.cache.offload.block_file import CorruptBlockError, BlockSchema, decode_schema
from v4jax.cache.parts import covered, pack, part_of, recut, unpack

WHOLE = BlockSchema("block", (("main", "bfloat16", (4, 16)), ("index", "uint8", (8,)), ("scale", "float32", ())))


def meshed(spec, shape, mesh=(2, 4)):
    devices = np.array(jax.devices()[: mesh[0] * mesh[1]]).reshape(mesh)
    return jax.device_put(np.zeros(shape, np.float32), NamedSharding(Mesh(devices, ("a", "b")), PartitionSpec(*spec)))


def half(form, number, axis=-1):
    """The form of one of two halves, along an axis, of every array that has one."""
    boxes = []
    for _, _, shape in form.table:
        box = [(0, size) for size in shape]
        if shape:
            box[axis] = (number * shape[axis] // 2, (number + 1) * shape[axis] // 2)
        boxes.append(tuple(box))
    return BlockSchema(form.kind, form.table, tuple(boxes))


def test_a_process_that_holds_all_writes_what_an_engine_without_a_mesh_writes():
    specs = [(None, "a", "b"), (None, ("a", "b")), ()]
    arrays = [meshed(spec, (3, *shape)) for spec, (_, _, shape) in zip(specs, WHOLE.table, strict=True)]
    assert part_of(WHOLE, arrays) is WHOLE
    arrays[0] = meshed(("a",), (4, 4, 16))
    with pytest.raises(ValueError, match="the pages of main are split over devices"):
        part_of(WHOLE, arrays)


def test_bytes_go_to_any_mesh_and_back():
    data = payload(WHOLE, name("a"))
    for first, second in [((), ("a", "b")), (("b",), (None, ("a", "b"))), (("b", "a"), ())]:
        where = [meshed(spec, shape).sharding for spec, shape in [(first, (4, 16)), (second[:1], (8,)), ((), ())]]
        arrays = unpack(WHOLE, data, dict(zip(["main", "index", "scale"], where, strict=True)))
        assert arrays["main"].dtype == jax.numpy.bfloat16 and arrays["main"].sharding == where[0]
        assert np.array_equal(pack(WHOLE, arrays), data)


@pytest.mark.parametrize("whole", [BLOCK, RECORD, WHOLE])
def test_halves_of_one_cut_give_those_of_another(whole):
    data = payload(whole, name("a"))
    halves = [(form := half(whole, number), recut(form, [(whole, data)])) for number in (0, 1)]
    assert all(bytes.size == form.nbytes < whole.nbytes and form.whole == whole for form, bytes in halves)
    assert len({whole.digest, *(form.digest for form, _ in halves)}) == 3
    assert np.array_equal(recut(whole, halves), data)
    for number in (0, 1):
        rows = half(whole, number, axis=0)
        assert np.array_equal(recut(rows, halves), recut(rows, [(whole, data)]))
        assert covered(rows, [form for form, _ in halves]) and not covered(rows, [halves[number][0]])
        assert covered(halves[number][0], [rows, halves[number][0]])


def test_a_file_tells_its_form(tmp_path):
    disk, forms = DiskTier(tmp_path, 1 << 30, "lru"), [BLOCK, half(BLOCK, 1), half(RECORD, 0, axis=0)]
    for form in forms:
        one = item(form, name("a"))
        disk.put(one)
        assert disk.form(one.key) == form
    assert disk.form(WHOLE.key(name("a"))) is None
    disk.close()
    path = next(path for path in tmp_path.iterdir() if path.name != "lock")
    data = np.fromfile(path, np.uint8)
    for at, wrong in [(0, 1), (10, 9), (50, 1), (130, 3), (140, 200)]:
        bad = data.copy()
        bad[at] ^= wrong
        with pytest.raises(CorruptBlockError):
            decode_schema(bad)
    with pytest.raises(CorruptBlockError):
        decode_schema(data[:50])
