"""transformers as the other side: it reads what we write and we read what it writes, bit for bit."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

import v4jax
from v4jax.checkpoint import hf, param_mapping
from v4jax.checkpoint import safetensors as st
from v4jax.models import hf_config

torch = pytest.importorskip("torch", reason="torch and transformers are the oracle of this file")
transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="transformers with deepseek_v4 is the oracle"
)

from safetensors.torch import save_file  # noqa: E402  (comes with transformers)

pytestmark = pytest.mark.slow


def _numpy(tensor) -> np.ndarray:
    """A torch tensor's bits as a numpy array."""
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def _random_hf(model, dtype):
    """A transformers model of our config with random weights in every tensor."""
    config = transformers.AutoConfig.for_model(**hf_config.to_hf(model))
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    torch.manual_seed(0)
    for tensor in net.state_dict().values():
        if tensor.dtype == torch.int64:
            tensor.random_(0, model.moe.n_routed_experts)
        else:
            tensor.normal_()
    return net


def _expected(state, tensors):
    """Flat tensors derived from a state_dict by hand-written rules, independent of the table under test."""
    result = {}
    for name in tensors:
        for ours, theirs in _MODULES.items():
            stem = name.removeprefix("layers.").split(".", 1)[-1] if name.startswith("layers.") else name
            if stem == ours:
                layer = f"layers.{name.split('.')[1]}." if name.startswith("layers.") else ""
                result[name] = theirs(
                    lambda leaf, layer=layer: _numpy(
                        state[leaf if leaf == "lm_head.weight" else f"model.{layer}{leaf}"]
                    )
                )
    assert list(result) == list(tensors)
    return result


def _heads(width):
    return lambda w: w.T.reshape(w.shape[1], -1, width)


def _plain(leaf):
    return lambda get: get(leaf)


def _t(leaf):
    return lambda get: get(leaf).T


_MODULES = {
    "embed.table": _plain("embed_tokens.weight"),
    "head.weight": _t("lm_head.weight"),
    "norm.scale": _plain("norm.weight"),
    "head_mhc.fn": lambda get: get("hc_head.hc_fn").reshape(4, 4, 64),
    "head_mhc.base": _plain("hc_head.hc_base"),
    "head_mhc.scale": _plain("hc_head.hc_scale"),
    "attn_norm.scale": _plain("input_layernorm.weight"),
    "ffn_norm.scale": _plain("post_attention_layernorm.weight"),
    "attn_mhc.fn": lambda get: get("attn_hc.fn").reshape(24, 4, 64),
    "attn_mhc.base": _plain("attn_hc.base"),
    "attn_mhc.scale": _plain("attn_hc.scale"),
    "ffn_mhc.fn": lambda get: get("ffn_hc.fn").reshape(24, 4, 64),
    "ffn_mhc.base": _plain("ffn_hc.base"),
    "ffn_mhc.scale": _plain("ffn_hc.scale"),
    "attn.q_down": _t("self_attn.q_a_proj.weight"),
    "attn.q_norm.scale": _plain("self_attn.q_a_norm.weight"),
    "attn.q_up": lambda get: _heads(32)(get("self_attn.q_b_proj.weight")),
    "attn.kv": _t("self_attn.kv_proj.weight"),
    "attn.kv_norm.scale": _plain("self_attn.kv_norm.weight"),
    "attn.sink": _plain("self_attn.sinks"),
    "attn.o_down": lambda get: get("self_attn.o_a_proj.weight").reshape(2, 16, 64).swapaxes(1, 2),
    "attn.o_up": lambda get: get("self_attn.o_b_proj.weight").T.reshape(2, 16, 64),
    "attn.compressor.kv": _t("self_attn.compressor.kv_proj.weight"),
    "attn.compressor.gate": _t("self_attn.compressor.gate_proj.weight"),
    "attn.compressor.ape": _plain("self_attn.compressor.position_bias"),
    "attn.compressor.norm.scale": _plain("self_attn.compressor.kv_norm.weight"),
    "attn.indexer.q_up": lambda get: _heads(16)(get("self_attn.compressor.indexer.q_b_proj.weight")),
    "attn.indexer.weight": _t("self_attn.compressor.indexer.scorer.weights_proj.weight"),
    "attn.indexer.compressor.kv": _t("self_attn.compressor.indexer.kv_proj.weight"),
    "attn.indexer.compressor.gate": _t("self_attn.compressor.indexer.gate_proj.weight"),
    "attn.indexer.compressor.ape": _plain("self_attn.compressor.indexer.position_bias"),
    "attn.indexer.compressor.norm.scale": _plain("self_attn.compressor.indexer.kv_norm.weight"),
    "ffn.router.weight": _t("mlp.gate.weight"),
    "ffn.router.bias": _plain("mlp.gate.e_score_correction_bias"),
    "ffn.router.table": lambda get: get("mlp.gate.tid2eid").astype(np.int32),
    "ffn.experts.gate_up": lambda get: np.stack(np.split(get("mlp.experts.gate_up_proj"), 2, axis=1), 1).swapaxes(2, 3),
    "ffn.experts.down": lambda get: get("mlp.experts.down_proj").swapaxes(1, 2),
    "ffn.shared.gate_up": lambda get: np.stack(
        [get("mlp.shared_experts.gate_proj.weight").T, get("mlp.shared_experts.up_proj.weight").T], 1
    ),
    "ffn.shared.down": _t("mlp.shared_experts.down_proj.weight"),
}


def _check_against_state(tensors, state):
    """Equal bits. Either side may hold norms and mHC as float32 and the other as bfloat16; widening is exact."""
    for name, want in _expected(state, tensors).items():
        got = tensors[name]
        wide = got.dtype if got.dtype == want.dtype else np.float32
        assert got.dtype == want.dtype or {got.dtype.name, want.dtype.name} == {"float32", "bfloat16"}, name
        assert got.shape == want.shape, name
        assert got.astype(wide).tobytes() == np.ascontiguousarray(want).astype(wide).tobytes(), name


@pytest.mark.parametrize("shard", ["200KB", "1GB"])
def test_we_read_what_transformers_saves(tmp_path, tiny, weights, shard):
    model = dataclasses.replace(tiny, dtype=weights.name)
    net = _random_hf(model, getattr(torch, weights.name))
    net.save_pretrained(tmp_path, max_shard_size=shard)
    got, tensors = hf.read_hf(tmp_path)
    assert (tmp_path / st.INDEX_NAME).exists() == (shard == "200KB")
    assert got == dataclasses.replace(model, num_nextn_predict_layers=0)  # transformers drops MTP
    _check_against_state(tensors, net.state_dict())


@pytest.mark.parametrize("prefix", [True, False])
def test_we_read_a_plain_dump_of_modules(tmp_path, tiny, weights, prefix):
    """A state_dict saved as it is: fused experts, module names, with or without the `model.` prefix."""
    net = _random_hf(tiny, getattr(torch, weights.name))
    state = {name if prefix else name.removeprefix("model."): t.contiguous() for name, t in net.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hf_config.to_hf(tiny)))
    tensors = hf.read_hf(tmp_path)[1]
    _check_against_state(tensors, net.state_dict())
    assert np.array_equal(tensors.read("layers.1.ffn.experts.gate_up", 2), tensors["layers.1.ffn.experts.gate_up"][2])


@pytest.mark.parametrize("limit", [10**9, 100_000])
def test_transformers_reads_what_we_write(tmp_path, tiny, random_flat, weights, limit):
    """MTP tensors are in the files; transformers must skip them and place all others."""
    model = dataclasses.replace(tiny, dtype=weights.name)
    flat = random_flat(model, weights)
    hf.write_hf(tmp_path / "m", model, flat, max_shard_bytes=limit)
    net, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype="auto", output_loading_info=True
    )
    assert net.dtype == getattr(torch, weights.name) and not any(info[k] for k in ("missing_keys", "mismatched_keys"))
    assert not info["unexpected_keys"]
    plain = {name: array for name, array in flat.items() if not name.startswith("mtp.")}
    _check_against_state(plain, net.state_dict())
    net.save_pretrained(tmp_path / "back", max_shard_size="150KB")
    _check_against_state(hf.read_hf(tmp_path / "back")[1], net.state_dict())


def test_a_loaded_model_computes_the_same(tmp_path, tiny):
    """What transformers saved and `v4jax.load` reads gives its logits, to 1e-4 of their spread."""
    model = dataclasses.replace(tiny, dtype="float32", layer_types=("swa", "csa", "hca"))
    net = _random_hf(model, torch.float32).eval()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():  # activations of order one
                tensor.mul_(tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.1).add_(1.0 if "norm" in name else 0.0)
            else:
                tensor.copy_(
                    torch.stack(
                        [torch.randperm(tiny.moe.n_routed_experts)[: tiny.moe.num_experts_per_tok] for _ in tensor]
                    )
                )
        tokens = torch.randint(0, tiny.vocab_size, (2, 45))
        wanted = net(tokens).logits.numpy()
    net.save_pretrained(tmp_path)
    logits = np.asarray(v4jax.load(tmp_path)(tokens.numpy()))
    assert np.abs(logits - wanted).max() <= 1e-4 * wanted.std()


def test_state_dict_is_covered_once(tiny):
    """Every transformers tensor is claimed by exactly one flat tensor."""
    state = _random_hf(tiny, torch.float32).state_dict()
    claimed = []
    for tensor in param_mapping.tensors(dataclasses.replace(tiny, num_nextn_predict_layers=0)).values():
        spelling = next(s for s in range(tensor.spellings) if tensor.first(s) in state)
        claimed += [piece.name for piece in tensor.pieces(spelling)]
    assert sorted(claimed) == sorted(state)
