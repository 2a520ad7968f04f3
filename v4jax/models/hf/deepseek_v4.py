"""Conversion between the config.json of model_type `deepseek_v4` and `v4jax.config.Model`.

The reader accepts two formats: the released one (compress_ratios, num_hash_layers, rope_scaling, qk_rope_head_dim) and
that of transformers 5 (layer_types, compress_rates, mlp_layer_types, nested rope_parameters). If a file has fields of
both, the precedence is that of transformers. The writer uses the second format, plus the released fields that
transformers ignores. Fields that the format lacks go under the key "v4jax", which transformers keeps and ignores.
"""

from __future__ import annotations

import math

from v4jax.config import HyperConnection, Indexer, Model, MoE, RoPE
from v4jax.core.errors import UserError
from v4jax.models.hf.fields import Fields

_LAYER_TYPES = {
    "sliding_attention": "swa",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
_TYPE_OF_KIND = {kind: name for name, kind in _LAYER_TYPES.items()}
ATTENTION = frozenset(_TYPE_OF_KIND)  # the `LayerSpec.attention` of the models that this format describes
# In the released format 4 and 128 only label the layer kind. Other fields may override the compression rates.
_KIND_OF_RATIO = {0: "swa", 4: "csa", 128: "hca"}
# Fields that change the computation in transformers. v4jax supports only these values, which are also the defaults.
_FIXED = {
    "scoring_func": "sqrtsoftplus",
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
# Fields that the transformers model does not read. They are written with the values of the released config.
_UNREAD = {
    "norm_topk_prob": True,
    "attention_bias": False,
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
}
# Integer fields with the same name in config.json and in our dataclasses. All are required, because the defaults of
# transformers are the shape of one particular model.
_MODEL_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "max_position_embeddings",
)
_MOE_INTEGERS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
_INDEXER_INTEGERS = ("index_n_heads", "index_head_dim", "index_topk")
_MHC_INTEGERS = ("hc_mult", "hc_sinkhorn_iters")
_YARN_FIELDS = ("yarn_original", "yarn_beta_fast", "yarn_beta_slow")
_OWN_FIELDS = ("dtype", "kv_qdq", "rope")
# Fields that `write` writes under other names, and fields that describe how the source stored its weights.
REPLACED = {
    "compress_rate_csa",
    "compress_rate_hca",
    "rope_scaling",
    "torch_dtype",
    "quantization_config",
    "expert_dtype",
    "v4jax",
}


def read(fields: Fields) -> Model:
    """Convert the fields of a config.json to a Model.

    Raises:
        UserError: a field is invalid.
    """
    values = fields.values
    for name, value in _FIXED.items():
        if name in values and values[name] != value:
            fields.fail(f"{name} is {values[name]!r}; v4jax supports {value!r} only")
    schedule = _schedule(fields)
    num_hash_layers = _hash_layers(fields, len(schedule))
    compress_rate_csa, compress_rate_hca = _rates(fields, schedule)
    own = fields.own("v4jax", values.get("v4jax", {}), _OWN_FIELDS)
    made = Model(
        **{name: fields.integer(name) for name in _MODEL_INTEGERS},
        layer_types=schedule,
        qk_rope_head_dim=_rope_dim(fields),
        compress_rate_csa=compress_rate_csa,
        compress_rate_hca=compress_rate_hca,
        rms_norm_eps=fields.number("rms_norm_eps"),
        num_nextn_predict_layers=_mtp_layers(fields),
        initializer_range=fields.number("initializer_range", 0.02),
        bos_id=fields.token("bos_token_id", 0),
        eos_id=fields.tokens("eos_token_id", 1),
        dtype=fields.dtype(own.get("dtype")),
        kv_qdq=own.get("kv_qdq", False) is True,
        rope=_rope(fields, fields.own("v4jax.rope", own.get("rope", {}), _YARN_FIELDS)),
        indexer=Indexer(**{name: fields.integer(name) for name in _INDEXER_INTEGERS}),
        moe=MoE(
            **{name: fields.integer(name) for name in _MOE_INTEGERS},
            num_hash_layers=num_hash_layers,
            routed_scaling_factor=fields.number("routed_scaling_factor"),
            swiglu_limit=fields.number("swiglu_limit"),
        ),
        mhc=HyperConnection(**{name: fields.integer(name) for name in _MHC_INTEGERS}, hc_eps=fields.number("hc_eps")),
    )
    model = fields.checked(made)
    if model.num_attention_heads % model.o_groups:
        fields.fail(f"num_attention_heads {model.num_attention_heads} is not a multiple of o_groups {model.o_groups}")
    return model


def write(model: Model, weights_dtype: str | None) -> dict:
    """Convert a Model to the fields of a config.json. The arguments are those of `hf_config.to_hf`.

    Raises:
        UserError: the format cannot describe this model.
    """
    if model.moe.n_shared_experts != 1:
        raise UserError(
            f"model.moe.n_shared_experts is {model.moe.n_shared_experts}; Hugging Face deepseek_v4 has exactly one "
            "shared expert, save this model in the orbax format"
        )
    rope_factor = _rotary_factor(model)
    main = {"rope_type": "default", "rope_theta": model.rope.rope_theta, "partial_rotary_factor": rope_factor}
    compress = main | {"rope_theta": model.rope.compress_rope_theta}
    own = {"kv_qdq": True} if model.kv_qdq else {}
    if model.rope.yarn_factor != 1:
        compress |= {
            "rope_type": "yarn",
            "factor": float(model.rope.yarn_factor),
            "original_max_position_embeddings": model.rope.yarn_original,
            "beta_fast": model.rope.yarn_beta_fast,
            "beta_slow": model.rope.yarn_beta_slow,
            "attention_factor": 1.0,  # transformers would derive 0.1 ln(factor) + 1, which V4 does not use
        }
    else:
        own["rope"] = {name: getattr(model.rope, name) for name in _YARN_FIELDS}
    if weights_dtype not in (None, model.dtype):
        own["dtype"] = model.dtype
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "dtype": weights_dtype or model.dtype,
        **{name: getattr(model, name) for name in _MODEL_INTEGERS},
        "num_hidden_layers": model.num_hidden_layers,
        "layer_types": [_TYPE_OF_KIND[layer.attention] for layer in model.layers],
        "compress_rates": {
            _TYPE_OF_KIND["csa"]: model.compress_rate_csa,
            _TYPE_OF_KIND["hca"]: model.compress_rate_hca,
        },
        "compress_ratios": [model.compress_rate(layer.attention) for layer in model.layers + model.mtp_layers],
        "mlp_layer_types": [layer.mlp for layer in model.layers],
        "num_hash_layers": model.moe.num_hash_layers,
        "num_nextn_predict_layers": model.num_nextn_predict_layers,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "partial_rotary_factor": rope_factor,
        "rope_theta": model.rope.rope_theta,
        "compress_rope_theta": model.rope.compress_rope_theta,
        "rope_parameters": {"main": main, "compress": compress},
        **{name: getattr(model.indexer, name) for name in _INDEXER_INTEGERS},
        **{name: getattr(model.moe, name) for name in _MOE_INTEGERS},
        "routed_scaling_factor": float(model.moe.routed_scaling_factor),
        "swiglu_limit": float(model.moe.swiglu_limit),
        **{name: getattr(model.mhc, name) for name in _MHC_INTEGERS},
        "hc_eps": float(model.mhc.hc_eps),
        "rms_norm_eps": float(model.rms_norm_eps),
        "initializer_range": float(model.initializer_range),
        "bos_token_id": model.bos_id,
        "eos_token_id": list(model.eos_id) if isinstance(model.eos_id, tuple) else model.eos_id,
        **_FIXED,
        **_UNREAD,
        **({"v4jax": own} if own else {}),
    }


# --- parts -------------------------------------------------------------------------------------------------------


def _schedule(fields: Fields) -> tuple[str, ...]:
    layers = fields.integer("num_hidden_layers")
    if fields.values.get("layer_types") is not None:
        return tuple(_LAYER_TYPES[name] for name in fields.list("layer_types", layers, tuple(_LAYER_TYPES)))
    if fields.values.get("compress_ratios") is None:
        fields.fail(
            "the field 'layer_types' (or 'compress_ratios') is missing; take the config.json that came with the weights"
        )
    return tuple(_KIND_OF_RATIO[ratio] for ratio in fields.list("compress_ratios", layers, tuple(_KIND_OF_RATIO)))


def _hash_layers(fields: Fields, layers: int) -> int:
    if fields.values.get("mlp_layer_types") is None:
        count = fields.get("num_hash_layers")
        if type(count) is not int or count < 0:
            fields.fail(f"num_hash_layers is {count!r}, which is no count")
        return min(count, layers)
    kinds = fields.list("mlp_layer_types", layers, ("hash_moe", "moe"))
    count = kinds.count("hash_moe")
    if "moe" in kinds[:count]:
        fields.fail("mlp_layer_types mixes its kinds; v4jax supports hash_moe layers first, then moe layers")
    return count


def _rates(fields: Fields, schedule: tuple[str, ...]) -> tuple[int, int]:
    """Return the compression rates of CSA and HCA layers.

    An invalid rate is an error only if the model has layers of that kind.
    """
    rates = fields.get("compress_rates", {})
    if not isinstance(rates, dict):
        fields.fail("compress_rates must be an object")
    result = []
    for kind, override, usual in (("csa", "compress_rate_csa", 4), ("hca", "compress_rate_hca", 128)):
        rate = fields.values.get(override)
        rate = rates.get(_TYPE_OF_KIND[kind], usual) if rate is None else rate
        valid = type(rate) is int and rate >= 1
        if kind in schedule and not valid:
            fields.fail(f"the compression rate of {_TYPE_OF_KIND[kind]} is {rate!r}, which is no positive integer")
        result.append(rate if valid else usual)
    return result[0], result[1]


def _mtp_layers(fields: Fields) -> int:
    """Return 0 or 1. MTP layers after the first are ignored; transformers ignores all of them."""
    count = fields.get("num_nextn_predict_layers", 0)
    if type(count) is not int or count < 0:
        fields.fail(f"num_nextn_predict_layers is {count!r}, which is no count")
    return min(count, 1)


def _rope_dim(fields: Fields) -> int:
    if fields.values.get("partial_rotary_factor") is None:
        return fields.integer("qk_rope_head_dim")
    return _rotary_dim(fields, fields.values["partial_rotary_factor"])


def _rotary_dim(fields: Fields, factor) -> int:
    """Return the number of rotary channels of a head from their fraction of `head_dim`."""
    if fields.check_number("partial_rotary_factor", factor) > 1:
        fields.fail(f"partial_rotary_factor is {factor!r}; a head has no more rotary channels than channels")
    return int(fields.integer("head_dim") * factor)


def _rotary_factor(model: Model) -> float:
    """Return a fraction f with int(head_dim * f) == qk_rope_head_dim, which is how transformers uses it."""
    factor = model.qk_rope_head_dim / model.head_dim
    return factor if int(model.head_dim * factor) == model.qk_rope_head_dim else math.nextafter(factor, 1.0)


def _rope(fields: Fields, own: dict) -> RoPE:
    """Read the RoPE bases and YaRN fields, with transformers' precedence between the flat and the nested format.

    Raises:
        UserError: with these fields transformers would fail, or rotate differently from spec 2.3.
    """
    theta, compress_rope_theta = fields.number("rope_theta", 10_000.0), fields.number("compress_rope_theta", 160_000.0)
    given = fields.values.get("rope_scaling") or fields.values.get("rope_parameters") or {}
    if not isinstance(given, dict):
        fields.fail(f"rope_parameters is {given!r}, which is no object")
    if isinstance(given.get("main"), dict) and isinstance(given.get("compress"), dict):
        main, compress = given["main"], given["compress"]
        compress_rope_theta = fields.check_number("rope_theta", compress.get("rope_theta", theta))
        theta = fields.check_number("rope_theta", main.get("rope_theta", theta))
        if _rope_type(main) != "default":
            fields.fail(f"rope type of 'main' is {_rope_type(main)!r}; V4 scales compressed layers only")
        _check_shares(fields, (main, compress))
    else:
        compress = {"attention_factor": 1.0} | given
    for base in (theta, compress_rope_theta):
        if not 1 < base < 1e30:
            fields.fail(f"rope_theta is {base!r}; it must lie between 1 and 1e30")
    return RoPE(rope_theta=theta, compress_rope_theta=compress_rope_theta, **_yarn(fields, compress, own))


def _check_shares(fields: Fields, parts: tuple[dict, ...]) -> None:
    """Check that `main` and `compress` rotate as many channels as the rest of the file sets."""
    for part in parts:
        share = part.get("partial_rotary_factor", fields.values.get("partial_rotary_factor"))
        if share is None:  # transformers would rotate all channels, but only in `main` layers
            fields.fail("rope_parameters lack partial_rotary_factor; set it to qk_rope_head_dim / head_dim")
        if _rotary_dim(fields, share) != _rope_dim(fields):
            fields.fail("partial_rotary_factor differs inside rope_parameters; v4jax has one for all layers")


def _yarn(fields: Fields, compress: dict, own: dict) -> dict:
    """Return the fields of RoPE other than the bases.

    `truncate` is not read, because transformers looks for it in a place that V4 configs do not have.
    """
    if _rope_type(compress) == "default":
        return own
    if _rope_type(compress) != "yarn":
        fields.fail(f"rope type {_rope_type(compress)!r} is not supported; v4jax knows 'default' and 'yarn'")
    for name in ("factor", "original_max_position_embeddings"):
        if compress.get(name) is None:
            fields.fail(f"yarn without {name}; take the config.json that came with the weights")
    factor = fields.check_number("factor", compress["factor"])
    original = fields.check_number("original_max_position_embeddings", compress["original_max_position_embeddings"])
    if not original.is_integer():
        fields.fail(f"original_max_position_embeddings is {original!r}, which is no positive integer")
    if _attention_factor(fields, compress, factor) != 1:
        fields.fail("V4 uses YaRN with attention_factor 1.0; set attention_factor to 1.0 if that is meant")
    beta_fast = fields.check_number("beta_fast", compress.get("beta_fast") or 32)
    beta_slow = fields.check_number("beta_slow", compress.get("beta_slow") or 1)
    values = {
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
    }
    for name, value in values.items():
        if not 1e-6 < value < 1e12:  # otherwise float32 frequencies or their logarithms may overflow
            fields.fail(f"{name} is {value!r}; it must lie between 1e-6 and 1e12")
    return {
        "yarn_factor": factor,
        "yarn_original": int(original),
        "yarn_beta_fast": beta_fast,
        "yarn_beta_slow": beta_slow,
    }


def _attention_factor(fields: Fields, yarn: dict, factor: float) -> float:
    """Return the factor by which transformers multiplies cos and sin.

    It is the given one, else it is derived from the `mscale` fields or from the YaRN factor.
    """
    if yarn.get("attention_factor") is not None:
        return fields.check_number("attention_factor", yarn["attention_factor"])
    scale = lambda share: 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1
    above, below = (yarn.get(name) or 0 for name in ("mscale", "mscale_all_dim"))
    if not above or not below:
        return scale(1)
    return scale(fields.check_number("mscale", above)) / scale(fields.check_number("mscale_all_dim", below))


def _rope_type(part: dict) -> str:
    return part.get("rope_type") or part.get("type") or "default"
