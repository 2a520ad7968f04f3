"""config.json <-> Model: both spellings, the released models, refusals, and transformers as the other side."""

import dataclasses
import json

import pytest

from v4jax import config
from v4jax.config import Config, Data, HyperConnection, Indexer, Model, MoE, RoPE, validate
from v4jax.core.errors import UserError
from v4jax.models import hf_config
from v4jax.models.hf import deepseek_v4


def released(**changes) -> dict:
    """A config.json in the spelling of the released V4-Flash, from the numbers of spec 1.1."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "vocab_size": 129280,
        "hidden_size": 4096,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 43,
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "sliding_window": 128,
        "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0],
        "compress_rope_theta": 160000,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": 1048576,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-06,
        "rms_norm_eps": 1e-06,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "use_cache": True,
        "expert_dtype": "fp4",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
    } | changes


def released_pro() -> dict:
    """The same for V4-Pro, with three draft stages as in its refresh."""
    return released(
        hidden_size=7168,
        moe_intermediate_size=3072,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        compress_ratios=[128, 128] + [4, 128] * 29 + [4] + [0, 0, 0],
        index_topk=1024,
        n_routed_experts=384,
        routed_scaling_factor=2.5,
    )


FLASH = Model(layer_types=("swa", "swa") + ("csa", "hca") * 20 + ("csa",), rope=RoPE(yarn_factor=16.0))
PRO = Model(
    layer_types=("hca", "hca") + ("csa", "hca") * 29 + ("csa",),
    rope=RoPE(yarn_factor=16.0),
    hidden_size=7168,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    indexer=Indexer(index_topk=1024),
    moe=MoE(n_routed_experts=384, moe_intermediate_size=3072, routed_scaling_factor=2.5),
)
ODD = Model(  # every field away from its default
    vocab_size=131,
    hidden_size=48,
    layer_types=("hca", "csa", "swa", "csa"),
    num_attention_heads=6,
    head_dim=49,
    qk_rope_head_dim=14,
    q_lora_rank=10,
    o_groups=3,
    o_lora_rank=7,
    sliding_window=17,
    compress_rate_csa=3,
    compress_rate_hca=15,
    max_position_embeddings=999,
    rms_norm_eps=3e-6,
    num_nextn_predict_layers=0,
    initializer_range=0.013,
    bos_id=5,
    eos_id=7,
    dtype="float32",
    kv_qdq=True,
    rope=RoPE(9999.5, 123456.5, 7.5, 77, 31.5, 1.5),
    indexer=Indexer(16, 24, 9),
    moe=MoE(9, 3, 11, 1, 2, 1.75, 8.5),
    mhc=HyperConnection(3, 11, 2e-6),
)
NO_YARN = dataclasses.replace(ODD, kv_qdq=False, num_nextn_predict_layers=1, rope=RoPE(1e4, 2e5, 1.0, 77, 31.5, 1.5))


def test_released_flash_and_pro():
    assert hf_config.from_hf(released()) == FLASH
    assert hf_config.from_hf(released_pro()) == PRO
    assert [FLASH.layer_types.count(kind) for kind in ("swa", "csa", "hca")] == [2, 21, 20]
    assert [PRO.layer_types.count(kind) for kind in ("swa", "csa", "hca")] == [0, 30, 31]


@pytest.mark.parametrize("model", [FLASH, PRO, ODD, NO_YARN], ids=["flash", "pro", "odd", "no_yarn"])
def test_round_trip_is_the_identity(model):
    values = json.loads(json.dumps(hf_config.to_hf(model)))
    assert hf_config.from_hf(values) == model
    stored = json.loads(json.dumps(hf_config.to_hf(model, weights_dtype="float32")))
    assert stored["dtype"] == "float32" and hf_config.from_hf(stored) == model


def test_written_fields():
    values = hf_config.to_hf(FLASH)
    assert values["architectures"] == ["DeepseekV4ForCausalLM"] and values["dtype"] == "bfloat16"
    assert values["compress_ratios"] == released()["compress_ratios"]
    assert values["mlp_layer_types"][2:5] == ["hash_moe", "moe", "moe"]
    assert "v4jax" not in values
    assert hf_config.to_hf(ODD)["v4jax"] == {"kv_qdq": True}


def test_reading_a_directory_or_a_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(released()))
    assert hf_config.read(tmp_path) == hf_config.read(tmp_path / "config.json") == FLASH
    with pytest.raises(UserError, match="config.json does not exist"):
        hf_config.read(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{,")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        hf_config.read(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds no JSON object"):
        hf_config.read(tmp_path)


def test_ratio_labels_and_rates():
    """128 labels an HCA layer even where its rate is overridden."""
    assert hf_config.from_hf(released(compress_rate_hca=16, compress_rate_csa=2)) == dataclasses.replace(
        FLASH, compress_rate_hca=16, compress_rate_csa=2
    )
    rates = {"compressed_sparse_attention": 8, "heavily_compressed_attention": 64}
    assert hf_config.from_hf(released(compress_rates=rates)).compress_rate_hca == 64


def test_small_variants():
    assert hf_config.from_hf(released(num_hidden_layers=2)).moe.num_hash_layers == 2
    assert hf_config.from_hf(released(rope_scaling=None)).rope == RoPE()
    assert hf_config.from_hf(released(torch_dtype="float16")).dtype == "float32"
    assert hf_config.from_hf(released(dtype="float32")).dtype == "float32"
    assert hf_config.from_hf(released(partial_rotary_factor=0.25)).qk_rope_head_dim == 128


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": False},
        {"attention_bias": True},
        {"num_key_value_heads": 8},
        {"n_shared_experts": 2},
        {"num_nextn_predict_layers": 3},
        {"rope_scaling": released()["rope_scaling"] | {"truncate": False}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_fields_that_transformers_does_not_read_have_no_effect(changes):
    assert hf_config.from_hf(released(**changes)) == FLASH


def test_the_rate_of_a_kind_without_layers_has_no_effect():
    layers = {"compress_ratios": [128] * 43, "compress_rate_csa": 0, "compress_rate_hca": 7}
    model = hf_config.from_hf(released(**layers))
    assert model.compress_rate_hca == 7 and set(model.layer_types) == {"hca"}
    validate(Config(model=model, data=Data(seq_len=7)))


def _without(name):
    return {key: value for key, value in released().items() if key != name}


@pytest.mark.parametrize(
    "given, eos_id, eos_ids",
    [
        (9, 9, (9,)),
        ([9], 9, (9,)),
        ([9, 2], (9, 2), (9, 2)),
        (None, None, ()),
        ([], None, ()),
        ("absent", 1, (1,)),
    ],
    ids=str,
)
def test_null_absent_and_lists_of_tokens_are_three_things(tmp_path, given, eos_id, eos_ids):
    values = _without("eos_token_id") if given == "absent" else released(eos_token_id=given)
    model = hf_config.from_hf(values)
    assert (model.eos_id, model.eos_ids) == (eos_id, eos_ids)
    assert hf_config.from_hf(json.loads(json.dumps(hf_config.to_hf(model)))) == model
    assert config.from_dict(config.Model, json.loads(json.dumps(config.to_dict(model)))) == model
    transformers = pytest.importorskip("transformers", minversion="5.23", reason="transformers is the oracle")
    for written in (values, hf_config.to_hf(model)):
        (tmp_path / "config.json").write_text(json.dumps(written))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path).eos_token_id
        assert tuple([theirs] if isinstance(theirs, int) else theirs or ()) == eos_ids


def test_a_bos_that_is_null_is_none():
    assert hf_config.from_hf(released(bos_token_id=None)).bos_id is None
    assert hf_config.from_hf(_without("bos_token_id")).bos_id == 0
    assert hf_config.to_hf(dataclasses.replace(FLASH, bos_id=None))["bos_token_id"] is None


@pytest.mark.parametrize(
    "name",
    [
        "hidden_size",
        "head_dim",
        "qk_rope_head_dim",
        "compress_ratios",
        "num_hash_layers",
        "index_topk",
        "n_routed_experts",
        "hc_mult",
        "swiglu_limit",
        "sliding_window",
        "num_hidden_layers",
    ],
)
def test_missing_fields(name):
    with pytest.raises(UserError, match=f"^DIR: the field .*'?{name}'?.* is missing; take the config.json"):
        hf_config.from_hf(_without(name), "DIR")


_NESTED = hf_config.to_hf(FLASH)["rope_parameters"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "deepseek_v41"}, "model_type is 'deepseek_v41'; v4jax reads 'deepseek_v4' only"),
        ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3'"),
        ({"model_type": None}, "model_type is None"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; v4jax supports 'sqrtsoftplus' only"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "llama3"}}, "rope type 'llama3' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 16}}, "yarn without original_max_position_embeddings"),
        ({"rope_scaling": released()["rope_scaling"] | {"attention_factor": 1.28}}, "attention_factor 1.0"),
        ({"rope_scaling": released()["rope_scaling"] | {"factor": 0}}, "factor is 0, which is no positive number"),
        (
            {"rope_scaling": released()["rope_scaling"] | {"original_max_position_embeddings": 0.5}},
            "original_max_position_embeddings is 0.5, which is no positive integer",
        ),
        (
            {"rope_scaling": released()["rope_scaling"] | {"beta_fast": 1e308}},
            r"beta_fast is 1e\+308; it must lie between 1e-6 and 1e12",
        ),
        ({"compress_rope_theta": 1}, "rope_theta is 1.0; it must lie between 1 and 1e30"),
        (
            {
                "rope_scaling": None,
                "rope_parameters": _NESTED | {"compress": _NESTED["compress"] | {"attention_factor": 2.0}},
            },
            "attention_factor",
        ),
        (
            {"rope_scaling": None, "rope_parameters": _NESTED | {"main": _NESTED["compress"]}},
            "rope type of 'main' is 'yarn'",
        ),
        (
            {"rope_scaling": None, "rope_parameters": _NESTED | {"main": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor",
        ),
        ({"compress_ratios": [0, 4, 16] + [4] * 40}, "compress_ratios has 16; known: 0, 4, 128"),
        ({"compress_ratios": [0] * 42}, "compress_ratios must list one value for each of the 43 layers"),
        ({"layer_types": ["full_attention"] * 43}, "layer_types has 'full_attention'"),
        ({"mlp_layer_types": ["moe", "hash_moe"] + ["moe"] * 41}, "hash_moe layers first, then moe"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1, which is no count"),
        ({"compress_rate_hca": 0}, "the compression rate of heavily_compressed_attention is 0"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', which is no positive integer"),
        ({"index_topk": 0}, "index_topk is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"eos_token_id": [1, -2]}, r"eos_token_id is \[1, -2\]; it must be a token id, a list of them or null"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token id"),
        ({"eos_token_id": [True]}, r"eos_token_id is True"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id is {'a': 1}"),
        ({"bos_token_id": [0]}, r"bos_token_id is \[0\]; it must be a token id or null"),
        ({"bos_token_id": 1.0}, "bos_token_id is 1.0; it must be"),
        ({"torch_dtype": "int8"}, "dtype is 'int8'"),
        ({"o_groups": 7}, "num_attention_heads 64 is not a multiple of o_groups 7"),
        ({"v4jax": {"kv_qdqq": True}}, "unknown field v4jax.kv_qdqq; known: dtype, kv_qdq, rope"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        hf_config.from_hf(released(**changes), "DIR/config.json")
    assert str(caught.value).startswith("DIR/config.json: ") and "\n" not in str(caught.value)


def test_two_shared_experts_cannot_be_written():
    with pytest.raises(UserError, match="exactly one shared expert"):
        hf_config.to_hf(dataclasses.replace(FLASH, moe=MoE(n_shared_experts=2)))


# --- transformers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v4_config():
    """The config class of transformers, the oracle."""
    transformers = pytest.importorskip(
        "transformers", minversion="5.23", reason="transformers with deepseek_v4 is the oracle"
    )
    return transformers.AutoConfig


@pytest.mark.parametrize("model", [FLASH, PRO, ODD, NO_YARN], ids=["flash", "pro", "odd", "no_yarn"])
def test_transformers_reads_and_rewrites_the_same_model(tmp_path, v4_config, model):
    (tmp_path / "config.json").write_text(json.dumps(hf_config.to_hf(model)))
    theirs = v4_config.from_pretrained(tmp_path)
    assert theirs.layer_types == [deepseek_v4._TYPE_OF_KIND[kind] for kind in model.layer_types]
    assert theirs.mlp_layer_types.count("hash_moe") == model.moe.num_hash_layers
    assert theirs.compress_rates == {
        "compressed_sparse_attention": model.compress_rate_csa,
        "heavily_compressed_attention": model.compress_rate_hca,
    }
    assert theirs.qk_rope_head_dim == model.qk_rope_head_dim
    assert theirs.num_nextn_predict_layers == model.num_nextn_predict_layers
    assert theirs.rope_parameters["main"]["rope_theta"] == model.rope.rope_theta
    assert theirs.rope_parameters["compress"]["rope_theta"] == model.rope.compress_rope_theta
    theirs.save_pretrained(tmp_path / "again")
    assert hf_config.read(tmp_path / "again") == model


@pytest.mark.parametrize("values", [released(), released_pro()], ids=["flash", "pro"])
def test_we_read_released_configs_as_transformers_does(tmp_path, v4_config, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    ours = hf_config.read(tmp_path)
    v4_config.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert hf_config.read(tmp_path / "again") == ours
