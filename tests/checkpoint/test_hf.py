"""Hugging Face directories without Hugging Face: round trips, quantized weights, and what users get wrong."""

import dataclasses
import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from v4jax.checkpoint import hf, param_mapping
from v4jax.checkpoint import safetensors as st
from v4jax.core.errors import UserError


@pytest.fixture
def saved(tmp_path, tiny, random_flat):
    """A small written model: its directory, config and tensors."""
    flat = random_flat(tiny, ml_dtypes.bfloat16)
    hf.write_hf(tmp_path / "m", tiny, flat)
    return tmp_path / "m", tiny, flat


def _rewrite(path, change):
    """Read all tensors of a directory, let `change` edit the dict, write them back as one file."""
    store = st.SafetensorsDir(path)
    tensors = {name: store.read(name) for name in store.names()}
    change(tensors)
    st._write_file(path / st.SINGLE_NAME, [st.Entry(n, a.dtype, a.shape, lambda a=a: a) for n, a in tensors.items()])


def _edit_config(path, **changes):
    values = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("limit", [10**9, 100_000])
def test_round_trip_is_exact(tmp_path, tiny, random_flat, same_bits, weights, limit):
    model = dataclasses.replace(tiny, dtype=weights.name)
    flat = random_flat(model, weights)
    hf.write_hf(tmp_path / "m", model, flat, max_shard_bytes=limit)
    got, tensors = hf.read_hf(tmp_path / "m")
    assert got == model
    same_bits(tensors, flat)
    hf.write_hf(tmp_path / "again", got, tensors, max_shard_bytes=limit)  # lazily, from one directory into the other
    for file in os.listdir(tmp_path / "m"):
        assert (tmp_path / "m" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_released_names_are_written(saved):
    names = set(st.SafetensorsDir(saved[0]).names())
    for name in (
        "embed.weight",
        "head.weight",
        "norm.weight",
        "hc_head_fn",
        "layers.0.attn.wq_a.weight",
        "layers.0.ffn.gate.tid2eid",
        "layers.1.ffn.gate.bias",
        "layers.3.ffn.experts.7.w3.weight",
        "layers.1.attn.indexer.compressor.ape",
        "layers.0.attn.kv_norm.weight",
        "mtp.0.e_proj.weight",
        "mtp.0.hc_head_scale",
        "mtp.0.ffn.shared_experts.w2.weight",
        "mtp.0.enorm.weight",
    ):
        assert name in names
    assert len(names) == sum(len(list(t.pieces())) for t in param_mapping.tensors(saved[1]).values())
    assert st.SafetensorsDir(saved[0]).dtype("layers.0.ffn.gate.tid2eid") == np.int64


def test_formats_follow_the_roles(saved, tmp_path, same_bits):
    path, model, flat = saved
    wide = hf.read_hf(path, dtype="float32")[1]
    for name, array in flat.items():
        want = array if array.dtype.kind == "i" else array.astype(np.float32)
        assert wide.dtype(name) == wide[name].dtype == want.dtype and np.array_equal(wide[name], want), name
    hf.write_hf(tmp_path / "narrow", model, wide, dtype="bfloat16")
    narrow = hf.read_hf(tmp_path / "narrow")[1]
    assert narrow.dtype("layers.0.attn.kv") == ml_dtypes.bfloat16
    assert narrow.dtype("norm.scale") == np.float32  # never narrowed
    same_bits({n: a for n, a in narrow.items() if "norm" not in n}, {n: a for n, a in flat.items() if "norm" not in n})
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"


def test_float16_becomes_float32(saved):
    path, _, flat = saved
    _rewrite(path, lambda t: t.update({n: a.astype(np.float16) for n, a in t.items() if a.dtype == ml_dtypes.bfloat16}))
    tensors = hf.read_hf(path)[1]
    assert tensors["norm.scale"].dtype == tensors["embed.table"].dtype == np.float32
    assert np.array_equal(tensors["embed.table"], flat["embed.table"].astype(np.float16).astype(np.float32))


def test_single_experts_are_read_alone(saved, monkeypatch):
    path, _, flat = saved
    tensors = hf.read_hf(path)[1]
    names = []
    original = st.SafetensorsDir.read
    monkeypatch.setattr(st.SafetensorsDir, "read", lambda s, n, i=(): (names.append(n), original(s, n, i))[1])
    assert np.array_equal(tensors.read("layers.1.ffn.experts.gate_up", 3), flat["layers.1.ffn.experts.gate_up"][3])
    assert names == ["layers.1.ffn.experts.3.w1.weight", "layers.1.ffn.experts.3.w3.weight"]
    got = tensors.read("layers.1.ffn.experts.down", slice(2, 5))
    assert np.array_equal(got, flat["layers.1.ffn.experts.down"][2:5])
    assert np.array_equal(tensors.read("head.weight", slice(1, 9)), flat["head.weight"][1:9])


def test_without_mtp_tensors_there_is_no_mtp(saved):
    path, model, flat = saved

    def drop(tensors):
        for name in [n for n in tensors if n.startswith("mtp.")]:
            del tensors[name]

    _rewrite(path, drop)
    got, tensors = hf.read_hf(path)
    assert got == dataclasses.replace(model, num_nextn_predict_layers=0)
    assert list(tensors) == [name for name in flat if not name.startswith("mtp.")]


def test_dspark_drafts_and_embedding_copies_are_skipped(saved):
    path, model, flat = saved
    _rewrite(path, lambda t: t.update({"mtp.0.embed.weight": t["embed.weight"], "mtp.0.head.weight": t["head.weight"]}))
    assert hf.read_hf(path)[0] == model
    _rewrite(path, lambda t: t.update({"mtp.0.main_proj.weight": t["norm.weight"]}))
    assert hf.read_hf(path)[0].num_nextn_predict_layers == 0


def test_model_prefix_is_accepted(saved, same_bits):
    path, _, flat = saved
    _rewrite(path, lambda t: [t.update({f"model.{name}": t.pop(name)}) for name in list(t) if name != "head.weight"])
    same_bits(hf.read_hf(path)[1], flat)


# --- quantized ---------------------------------------------------------------------------------------------------


def test_fp8_golden():
    """Blocks of 2 x 3 over a 3 x 4 matrix, with ragged edges; scales 2^(byte - 127)."""
    values = np.array([[1, 2, 3, 4], [-0.5, 448, 0, 2**-9], [1.125, -1, 1, 1]], ml_dtypes.float8_e4m3fn)
    scale = np.array([[127, 128], [120, 137]], np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert scale.tolist() == [[1, 2], [2**-7, 1024]]
    want = [[1, 2, 3, 8], [-0.5, 448, 0, 2**-8], [1.125 / 128, -1 / 128, 1 / 128, 1024]]
    assert hf.dequantize_fp8(values, scale, (2, 3)).tolist() == want


def test_fp4_golden():
    """All 16 codes, low nibble = even element, two groups of 32 per row."""
    packed = np.array([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 4], np.uint8).view(np.int8)
    codes = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    scale = np.array([[126, 129]], np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    got = hf.dequantize_fp4(packed, scale)
    assert got.shape == (1, 64)
    assert got[0].tolist() == [c * 0.5 for c in codes * 2] + [c * 4.0 for c in codes * 2]
    assert np.signbit(got[0, 8]) and not np.signbit(got[0, 0])


def _quantize(tensors, scale_name):
    """Random FP8 for attention and shared experts, packed FP4 for routed ones; returns the exact float32 values."""
    rng, exact = np.random.default_rng(1), {}
    for name in list(tensors):
        if ".experts." in name:
            out, inner = tensors[name].shape
            tensors[name] = rng.integers(0, 256, (out, inner // 2), np.uint8).view(np.int8)
            scale = rng.integers(120, 130, (out, inner // 32), np.uint8).view(ml_dtypes.float8_e8m0fnu)
            low, high = tensors[name].view(np.uint8) & 15, tensors[name].view(np.uint8) >> 4
            codes = np.stack([low, high], -1).reshape(out, inner)
            table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
            exact[name] = table[codes] * np.repeat(scale.astype(np.float32), 32, 1)
        elif "shared_experts" in name or ".attn.w" in name:
            tensors[name] = rng.standard_normal(tensors[name].shape, np.float32).astype(ml_dtypes.float8_e4m3fn)
            blocks = [-(-size // 16) for size in tensors[name].shape]
            scale = rng.integers(120, 130, blocks, np.uint8).view(ml_dtypes.float8_e8m0fnu)
            full = np.kron(scale.astype(np.float32), np.ones((16, 16), np.float32))
            exact[name] = tensors[name].astype(np.float32) * full[: tensors[name].shape[0], : tensors[name].shape[1]]
        else:
            continue
        tensors[name.removesuffix("weight") + scale_name] = scale
    return exact


@pytest.mark.parametrize("scale_name", ["scale", "weight_scale_inv"])
def test_released_quantized_checkpoint(saved, scale_name):
    path, model, flat = saved
    exact = {}
    _rewrite(path, lambda t: exact.update(_quantize(t, scale_name)))
    _edit_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]}, expert_dtype="fp4")
    tensors = hf.read_hf(path, dtype="float32")[1]
    down = tensors["layers.2.ffn.experts.down"]
    assert np.array_equal(down[4], exact["layers.2.ffn.experts.4.w2.weight"].T)
    gate_up = tensors["mtp.0.block.ffn.experts.gate_up"]
    assert np.array_equal(gate_up[1, 1], exact["mtp.0.ffn.experts.1.w3.weight"].T)
    assert np.array_equal(tensors["layers.0.attn.q_down"], exact["layers.0.attn.wq_a.weight"].T)
    assert np.array_equal(
        tensors["layers.0.ffn.shared.gate_up"][:, 0], exact["layers.0.ffn.shared_experts.w1.weight"].T
    )
    assert np.array_equal(tensors["embed.table"], flat["embed.table"].astype(np.float32))
    narrow = hf.read_hf(path)[1]
    for name in ("layers.2.ffn.experts.down", "layers.0.attn.q_down"):  # bfloat16 holds both formats exactly
        assert narrow[name].dtype == ml_dtypes.bfloat16 == narrow.dtype(name)
        assert np.array_equal(narrow[name].astype(np.float32), tensors[name])


@pytest.mark.parametrize(
    "name, place, value",
    [
        ("layers.0.attn.wq_a.scale", (1, 2), 255),
        ("layers.2.ffn.experts.4.w2.scale", (3, 0), 255),
        ("layers.0.attn.wq_a.weight", (5, 7), 0x7F),
        ("layers.0.attn.wq_a.weight", (0, 0), 0xFF),
    ],
)
def test_a_byte_that_stands_for_no_number_is_a_damaged_tensor(saved, name, place, value):
    """Read as numbers, one E8M0 scale of 255 makes a block of weights and then all logits NaN."""
    path, _, _ = saved
    _rewrite(path, lambda t: (_quantize(t, "scale"), t[name].view(np.uint8).__setitem__(place, value)))
    _edit_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]}, expert_dtype="fp4")
    tensors = hf.read_hf(path)[1]
    with pytest.raises(UserError, match=rf"{name} is damaged, its element \[{place[0]}, {place[1]}\] is nan; copy"):
        list(tensors.items())


@pytest.mark.parametrize("dtype, value", [("bfloat16", np.nan), ("float32", np.inf), ("float16", -np.inf)])
def test_infinities_and_nans_are_a_damaged_tensor(saved, dtype, value):
    path, _, _ = saved

    def change(tensors):
        tensors["embed.weight"] = tensors["embed.weight"].astype(dtype)
        tensors["embed.weight"][17, 3] = value

    _rewrite(path, change)
    with pytest.raises(UserError, match=r"model.safetensors: embed.weight is damaged, its element \[17, 3\] is"):
        hf.read_hf(path)[1]["embed.table"]


def test_drafts_after_the_first_are_not_read(saved, same_bits):
    path, model, flat = saved
    more = lambda t: t.update({n.replace("mtp.0.", "mtp.1."): a for n, a in list(t.items()) if n.startswith("mtp.0.")})
    _rewrite(path, more)
    _edit_config(path, num_nextn_predict_layers=2)
    got, tensors = hf.read_hf(path)
    assert got == model
    same_bits(tensors, flat)


def test_quantized_without_or_with_wrong_scale(saved):
    path, _, _ = saved
    name = "layers.0.attn.wq_a"
    _rewrite(path, lambda t: t.update({f"{name}.weight": np.zeros((24, 64), ml_dtypes.float8_e4m3fn)}))
    with pytest.raises(UserError, match="wq_a.weight is F8_E4M3 without a scale beside it"):
        hf.read_hf(path)
    _rewrite(path, lambda t: t.update({f"{name}.scale": np.ones((2, 2), np.float32)}))
    with pytest.raises(UserError, match=r"has a scale that has shape \[2, 2\] instead of \[1, 1\]"):
        hf.read_hf(path)
    _rewrite(path, lambda t: t.update({f"{name}.scale": np.full((1, 1), 127, np.uint8)}))
    with pytest.raises(UserError, match="has a scale of type U8 instead of"):
        hf.read_hf(path)


# --- what users get wrong ----------------------------------------------------------------------------------------


def test_missing_unexpected_and_wrong_tensors_in_one_line(saved):
    path, _, _ = saved

    def damage(tensors):
        for expert in range(5):
            del tensors[f"layers.1.ffn.experts.{expert}.w1.weight"]
        tensors["extra.weight"] = np.zeros(3, np.float32)
        tensors["norm.weight"] = np.zeros(65, np.float32)

    _rewrite(path, damage)
    with pytest.raises(UserError) as caught:
        hf.read_hf(path)
    message = str(caught.value)
    assert "\n" not in message and "does not fit its config.json" in message
    assert "missing: layers.1.ffn.experts.0.w1.weight, layers.1.ffn.experts.1.w1.weight, " in message
    assert " and 2 more; unexpected: extra.weight; wrong: norm.weight has shape [65] instead of [64]; check" in message


@pytest.mark.parametrize("expert", [8, -1])
def test_hash_table_out_of_range(saved, expert):
    path, _, _ = saved
    _rewrite(path, lambda t: t["layers.0.ffn.gate.tid2eid"].__setitem__((3, 1), expert))
    tensors = hf.read_hf(path)[1]
    with pytest.raises(UserError, match=f"names expert {expert}, but the model has 8"):
        tensors["layers.0.ffn.router.table"]


def test_other_architecture_and_missing_config(saved):
    path, _, _ = saved
    _edit_config(path, model_type="deepseek_v41")
    with pytest.raises(UserError, match="model_type is 'deepseek_v41'"):
        hf.read_hf(path)
    os.remove(path / "config.json")
    with pytest.raises(UserError, match="config.json does not exist"):
        hf.read_hf(path)


def test_writing_what_does_not_fit(tmp_path, tiny, random_flat):
    flat = random_flat(tiny, np.float32)
    del flat["norm.scale"], flat["layers.0.attn.kv"]
    flat["bogus"] = np.zeros(1, np.float32)
    flat["head.weight"] = flat["head.weight"].T
    with pytest.raises(UserError) as caught:
        hf.write_hf(tmp_path / "m", tiny, flat)
    assert (
        "missing: norm.scale, layers.0.attn.kv; unexpected: bogus; wrong: head.weight [128, 64] instead of [64, 128]"
        in str(caught.value)
    )
    assert os.listdir(tmp_path) == []


def test_full_disk_keeps_the_previous_model(saved, monkeypatch, same_bits):
    path, model, flat = saved
    original = st.write_all

    def write(file, data):
        if "model" in os.path.basename(file.name) and len(memoryview(data)) > 5000:
            raise OSError(28, "No space left on device")
        original(file, data)

    monkeypatch.setattr(st, "write_all", write)
    with pytest.raises(UserError, match="No space left on device"):
        hf.write_hf(path, model, {name: array * 0 for name, array in flat.items()})
    assert os.listdir(path.parent) == ["m"]
    same_bits(hf.read_hf(path)[1], flat)


def test_tokenizer_files_travel(tmp_path, tiny, random_flat):
    source = tmp_path / "tok"
    source.mkdir()
    flat = random_flat(tiny, np.float32)
    with pytest.raises(UserError, match="has no tokenizer.json"):
        hf.write_hf(tmp_path / "m", tiny, flat, tokenizer_dir=source)
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "notes.txt").write_text("")
    hf.write_hf(tmp_path / "m", tiny, flat, tokenizer_dir=source)
    assert sorted(os.listdir(tmp_path / "m")) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    hf.write_hf(tmp_path / "one", tiny, flat, tokenizer_dir=source / "tokenizer.json")
    assert sorted(os.listdir(tmp_path / "one")) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_import_is_light():
    code = "import sys, v4jax.checkpoint.hf; assert not {'jax', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
