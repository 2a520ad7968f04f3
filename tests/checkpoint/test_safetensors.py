"""Own safetensors reader and writer: slices, the library as the other side, damage, full disks."""

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest

from v4jax.checkpoint import safetensors as st
from v4jax.core import atomic, dtypes
from v4jax.core.errors import UserError


def _entries(tensors):
    return [st.Entry(name, a.dtype, a.shape, lambda a=a: a) for name, a in tensors.items()]


def _replace(path):
    return atomic.replace_directory(path, "config.json", lambda name: name.endswith((".safetensors", ".index.json")))


def _write(path, tensors, **kwargs):
    with _replace(path) as directory:
        atomic.write_text(directory / "config.json", "{}")
        st.write_safetensors(directory, _entries(tensors), **kwargs)


def _random(code, shape, seed=0):
    rng = np.random.default_rng(seed)
    dtype = dtypes.numpy_dtype(code)
    if code in ("BOOL", "F4"):
        return rng.integers(0, 2 if code == "BOOL" else 16, shape).astype(np.uint8).view(dtype)
    return rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype).reshape(shape)


def _raw(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


@pytest.fixture
def tensors():
    """Names and arrays of mixed types; 3 MB are never needed, kilobytes show all there is."""
    result = {f"t.{code}": _random(code, (4, 6)) for code in dtypes.CODES}
    return result | {
        "scalar": np.float32(3.5).reshape(()),
        "empty": np.zeros((0, 3), np.float32),
        "cube": _random("BF16", (5, 4, 3)),
    }


@pytest.mark.parametrize("limit", [10**9, 100])
def test_round_trip_of_every_type(tmp_path, tensors, limit):
    _write(tmp_path / "m", tensors, max_shard_bytes=limit)
    store = st.SafetensorsDir(tmp_path / "m")
    assert sorted(store.names()) == sorted(tensors)
    for name, array in tensors.items():
        assert store.dtype(name) == array.dtype and store.shape(name) == array.shape
        assert store.read(name).tobytes() == array.tobytes(), name
    assert (tmp_path / "m" / st.INDEX_NAME).exists() == (limit == 100)


@pytest.mark.parametrize(
    "index",
    [
        2,
        (1, 2),
        slice(1, 3),
        (slice(0, 4), 1),
        (slice(1, 4), slice(1, 3)),
        (0, slice(2, 4), 1),
        (-1, -1, -1),
        (slice(None), slice(None), slice(0, 2)),
        (slice(3, 3),),
    ],
)
def test_slices_equal_numpy(tmp_path, tensors, index):
    _write(tmp_path / "m", tensors)
    want = tensors["cube"][index]
    for verify in (True, False):
        got = st.SafetensorsDir(tmp_path / "m", verify).read("cube", index)
        assert got.shape == want.shape and got.tobytes() == want.tobytes() and got.flags.writeable


def test_a_slice_reads_only_its_bytes(tmp_path, tensors, monkeypatch):
    _write(tmp_path / "m", {"cube": tensors["cube"]})
    store = st.SafetensorsDir(tmp_path / "m", verify=False)
    sizes = []
    original = st._read_into
    monkeypatch.setattr(st, "_read_into", lambda f, i, o, out: (sizes.append(out.nbytes), original(f, i, o, out)))
    store.read("cube", (slice(1, 3),))
    store.read("cube", (slice(0, 2), slice(1, 3)))
    assert sizes == [2 * 4 * 3 * 2, 2 * 3 * 2, 2 * 3 * 2]  # one run for whole rows, one per row for a part of it


def test_bad_indices_are_errors(tmp_path, tensors):
    _write(tmp_path / "m", tensors)
    store = st.SafetensorsDir(tmp_path / "m")
    for index in [5, (0, 0, 0, 0), slice(0, 4, 2)]:
        with pytest.raises(IndexError):
            store.read("cube", index)


def test_library_reads_ours_and_we_read_the_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy", reason="the safetensors library is the oracle")
    tensors = {code: _random(code, (3, 5)) for code in ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL")}
    _write(tmp_path / "ours", tensors)
    theirs = library.load_file(tmp_path / "ours" / st.SINGLE_NAME)
    library.save_file(tensors, tmp_path / "theirs.safetensors")
    store = st.SafetensorsDir(tmp_path / "theirs.safetensors")
    for name, array in tensors.items():
        assert theirs[name].tobytes() == store.read(name).tobytes() == array.tobytes()


def test_torch_reads_our_fp8_and_bf16_aligned(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the oracle for the types numpy lacks")
    library = pytest.importorskip("safetensors.torch", reason="the safetensors library is the oracle")
    # The odd byte count first would misalign everything behind it if files kept the given order.
    tensors = {c: _random(c, (3, 5)) for c in ("F8_E4M3", "I8", "BF16", "F8_E8M0", "F32", "I64", "F8_E5M2")}
    _write(tmp_path / "m", tensors)
    for name, tensor in library.load_file(tmp_path / "m" / st.SINGLE_NAME).items():
        assert bytes(tensor.contiguous().view(torch.uint8).flatten().tolist()) == tensors[name].tobytes(), name


def test_shards_stay_below_the_limit(tmp_path):
    _write(tmp_path / "m", {f"{i}": np.full(10, i, np.float32) for i in range(7)}, max_shard_bytes=100)
    index = json.loads((tmp_path / "m" / st.INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 280
    assert sorted(set(index["weight_map"].values())) == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]


# --- damage ------------------------------------------------------------------------------------------------------

_GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def _with(**changes):
    return {"a": _GOOD["a"] | changes}


@pytest.mark.parametrize(
    "header, data, length, message",
    [
        (_GOOD, b"\0" * 7, None, "is truncated: 'a' ends at byte"),
        (_GOOD, b"\0" * 8, 10**6, "no complete header"),
        (b"{not json", b"", None, "unreadable header"),
        (b"[1]", b"", None, "no JSON object"),
        ({"__metadata__": {"xxh3_64": [1]}}, b"", None, "no object of strings"),
        ({"__metadata__": [1]}, b"", None, "no object of strings"),
        ({"__metadata__": {"xxh3_64": "[1]"}}, b"", None, "no JSON object"),
        (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{}}', b"\0", None, "occurs twice"),
        (_with(shape=[3]), b"\0" * 8, None, r"gives 'a' 8 bytes, but F32\[3\] takes 12"),
        (_with(shape=[-2]), b"\0" * 8, None, "bad shape or offset"),
        (_with(data_offsets=[8, 0]), b"\0" * 8, None, "gives 'a' -8 bytes"),
        (_with(data_offsets=[0]), b"\0" * 8, None, "bad header entry"),
        ({"a": 3}, b"", None, "bad header entry"),
        (_with(dtype="C64"), b"\0" * 8, None, "type 'C64'"),
        ({**_GOOD, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"\0" * 12, None, "overlapping"),
    ],
)
def test_damaged_files(tmp_path, header, data, length, message):
    _raw(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(UserError, match=message) as caught:
        st.SafetensorsDir(tmp_path)
    assert "model.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_file_cut_after_opening(tmp_path):
    _raw(tmp_path / "model.safetensors", _GOOD, b"\0" * 8)
    store = st.SafetensorsDir(tmp_path)
    os.truncate(tmp_path / "model.safetensors", os.path.getsize(tmp_path / "model.safetensors") - 4)
    with pytest.raises(UserError, match="ends inside a tensor"):
        store.read("a")


def test_missing_things(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        st.SafetensorsDir(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no .safetensors file"):
        st.SafetensorsDir(tmp_path)
    _raw(tmp_path / "model-00001-of-00002.safetensors", _GOOD, b"\0" * 8)
    with pytest.raises(UserError, match="lacks the shard model-00002-of-00002.safetensors"):
        st.SafetensorsDir(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / st.INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match="names the shard model-00002-of-00002.safetensors, which is missing"):
        st.SafetensorsDir(tmp_path)
    _raw(tmp_path / "model-00002-of-00002.safetensors", {})
    with pytest.raises(UserError, match="places 'b' in model-00002-of-00002.safetensors, which does not hold it"):
        st.SafetensorsDir(tmp_path)
    (tmp_path / st.INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(UserError, match="has no tensor 'zzz'"):
        st.SafetensorsDir(tmp_path).read("zzz")
    (tmp_path / st.INDEX_NAME).write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        st.SafetensorsDir(tmp_path)


# --- all or nothing ----------------------------------------------------------------------------------------------


def _fill_disk_after(monkeypatch, count):
    """Writes fail with ENOSPC from call number `count` on."""
    original, calls = atomic.write_all, []

    def write(file, data):
        calls.append(1)
        if len(calls) > count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file, data)

    for module in (st, atomic):
        monkeypatch.setattr(module, "write_all", write)


@pytest.mark.parametrize("count", [0, 1, 2, 4])
@pytest.mark.parametrize("old", [True, False])
def test_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, count, old):
    if old:
        _write(tmp_path / "m", {"a": np.ones(4, np.float32)})
    _fill_disk_after(monkeypatch, count)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        _write(tmp_path / "m", {n: np.zeros(8, np.float32) for n in "abc"}, max_shard_bytes=32)
    assert sorted(os.listdir(tmp_path)) == (["m"] if old else [])
    if old:
        assert st.SafetensorsDir(tmp_path / "m").read("a").tolist() == [1, 1, 1, 1]


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(st, "_write_file", lambda *_: pytest.fail("wrote"))
    huge = st.Entry("a", np.dtype(np.float32), (10**9, 10**9), lambda: None)
    with pytest.raises(UserError, match="No space left"), _replace(tmp_path / "m") as directory:
        st.write_safetensors(directory, [huge])
    assert os.listdir(tmp_path) == []


def test_f4_packs_low_nibble_first(tmp_path):
    values = np.array([[0.5, -6.0], [3.0, 0.0]], ml_dtypes.float4_e2m1fn)
    _write(tmp_path / "m", {"a": values})
    assert (tmp_path / "m" / st.SINGLE_NAME).read_bytes()[-2:] == bytes([0xF1, 0x05])
    assert st.SafetensorsDir(tmp_path / "m").read("a", 1).astype(np.float32).tolist() == [3.0, 0.0]
    with pytest.raises(UserError, match="must be even"):
        dtypes.nbytes("F4", (3,))


def test_table_of_types():
    assert [dtypes.bytes_per_element(c) for c in ("F32", "BF16", "F8_E8M0", "F4", "I64")] == [4, 2, 1, 0.5, 8]
    for code in dtypes.CODES:
        assert dtypes.code_of(dtypes.numpy_dtype(code)) == code
    for bad in (np.complex64, "U7"):
        with pytest.raises((UserError, TypeError)):
            dtypes.code_of(bad)
    with pytest.raises(UserError, match="'F7' is not supported"):
        dtypes.numpy_dtype("F7")
