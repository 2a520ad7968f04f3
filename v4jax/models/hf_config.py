"""Conversion between the Hugging Face config.json of `deepseek_v4` and `v4jax.config.Model`.

The reader accepts two formats: the released one (compress_ratios, num_hash_layers, rope_scaling, qk_rope_head_dim) and
that of transformers 5 (layer_types, compress_rates, mlp_layer_types, nested rope_parameters). If a file has fields of
both, the precedence is that of transformers. The writer uses the second format, plus the released fields that
transformers ignores. Fields that the format lacks go under the key "v4jax", which transformers keeps and ignores.
"""

from __future__ import annotations

import math
import os
import pathlib
import sys

from v4jax.config import ConfigError, HyperConnection, Indexer, Model, MoE, RoPE, check_values
from v4jax.core import untrusted_json
from v4jax.core.errors import UserError

MODEL_TYPE = "deepseek_v4"
_LAYER_TYPES = {
    "sliding_attention": "swa",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
_TYPE_OF_KIND = {kind: name for name, kind in _LAYER_TYPES.items()}
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
_MOST = 1e15  # larger integers are mistakes; each field also has a tighter bound of its own
_OWN_FIELDS = ("dtype", "kv_qdq", "rope")
# Fields that `to_hf` writes under other names, and fields that describe how the source stored its weights.
_REPLACED = {
    "compress_rate_csa",
    "compress_rate_hca",
    "rope_scaling",
    "torch_dtype",
    "quantization_config",
    "expert_dtype",
    "v4jax",
}


def read(path: str | os.PathLike) -> Model:
    """Read the model config from a config.json or its directory.

    Raises:
        UserError: the file is missing or is not a valid V4 config.
    """
    return from_hf(*load_json(path))


def load_json(path: str | os.PathLike) -> tuple[dict, str]:
    """Load a config.json, given the file or its directory.

    Returns:
        The raw fields, and the path for error messages.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    path = pathlib.Path(path)
    path = path / "config.json" if path.is_dir() or path.suffix != ".json" else path
    if not os.path.lexists(path):
        raise UserError(f"{path} does not exist; give a Hugging Face model directory")
    return untrusted_json.read_object(path), str(path)


def from_hf(values: dict, source: str = "config.json") -> Model:
    """Convert the fields of a config.json to a Model.

    Each field is checked against its range. Most relations between fields are not checked; the caller does that with
    `v4jax.config.validate` before it runs the model.

    Args:
        values: the fields.
        source: name of the file in error messages.

    Raises:
        UserError: a field is invalid. The message names `source`, the field and the cure.
    """
    fields = _Fields(values, source)
    found = values.get("model_type")
    if found != MODEL_TYPE:
        fields.fail(f"model_type is {found!r}; v4jax reads {MODEL_TYPE!r} only (V3 and V4.1 are other architectures)")
    for name, value in _FIXED.items():
        if name in values and values[name] != value:
            fields.fail(f"{name} is {values[name]!r}; v4jax supports {value!r} only")
    schedule = _schedule(fields)
    num_hash_layers = _hash_layers(fields, len(schedule))
    compress_rate_csa, compress_rate_hca = _rates(fields, schedule)
    own = fields.own("v4jax", values.get("v4jax", {}), _OWN_FIELDS)
    model = Model(
        **{name: fields.integer(name) for name in _MODEL_INTEGERS},
        layer_types=schedule,
        qk_rope_head_dim=_rope_dim(fields),
        compress_rate_csa=compress_rate_csa,
        compress_rate_hca=compress_rate_hca,
        rms_norm_eps=fields.number("rms_norm_eps"),
        num_nextn_predict_layers=_mtp_layers(fields),
        initializer_range=fields.number("initializer_range", 0.02),
        bos_id=_token(fields, "bos_token_id", 0),
        eos_id=_tokens(fields, "eos_token_id", 1),
        dtype=_dtype(fields, own.get("dtype")),
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
    try:
        check_values(model, "model.")
    except ConfigError as error:
        fields.fail(f"{error} (in v4jax's names)")
    if model.num_attention_heads % model.o_groups:
        fields.fail(f"num_attention_heads {model.num_attention_heads} is not a multiple of o_groups {model.o_groups}")
    return model


def to_hf(model: Model, weights_dtype: str | None = None) -> dict:
    """Convert a Model to the fields of a config.json from which transformers builds the same model.

    Args:
        model: the model config.
        weights_dtype: dtype of the stored weights ("float32", "bfloat16"). None means model.dtype.

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
    layers, hashed = model.num_hidden_layers, model.moe.num_hash_layers
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": weights_dtype or model.dtype,
        **{name: getattr(model, name) for name in _MODEL_INTEGERS},
        "num_hidden_layers": layers,
        "layer_types": [_TYPE_OF_KIND[kind] for kind in model.layer_types],
        "compress_rates": {
            _TYPE_OF_KIND["csa"]: model.compress_rate_csa,
            _TYPE_OF_KIND["hca"]: model.compress_rate_hca,
        },
        "compress_ratios": [model.compress_rate(kind) for kind in model.layer_types]
        + [0] * model.num_nextn_predict_layers,
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        "num_hash_layers": hashed,
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


def unknown_fields(values: dict) -> dict:
    """Return the fields of a config.json that v4jax neither reads nor writes, so that a conversion can copy them."""
    written = to_hf(from_hf(values))
    return {name: value for name, value in values.items() if name not in written and name not in _REPLACED}


# --- parts -------------------------------------------------------------------------------------------------------


class _Fields:
    """The fields of a config.json with checked access. Every error message names the file."""

    def __init__(self, values: dict, source: str):
        self.values, self.source = values, source

    def fail(self, message: str):
        raise UserError(f"{self.source}: {message}")

    def get(self, name: str, default=None):
        value = self.values.get(name)
        if value is None and default is None:
            self.fail(f"the field {name!r} is missing; take the config.json that came with the weights")
        return default if value is None else value

    def integer(self, name: str) -> int:
        value = self.get(name)
        if type(value) is not int or not 1 <= value <= _MOST:
            self.fail(f"{name} is {value!r}, which is no positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        return self.check_number(name, self.get(name, default))

    def check_number(self, name: str, value) -> float:
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            self.fail(f"{name} is {value!r}, which is no positive number")
        return float(value)

    def own(self, name: str, value, known: tuple[str, ...]) -> dict:
        """Return an object that v4jax itself wrote. A field outside `known` is an error: a newer version or a typo."""
        if not isinstance(value, dict):
            self.fail(f"{name} must be an object")
        for key in value:
            if key not in known:
                self.fail(f"unknown field {name}.{key}; known: {', '.join(known)}")
        return value

    def list(self, name: str, length: int, known: tuple) -> list:
        """Return the first `length` entries of a per-layer list, each in `known`. MTP layers follow and are ignored."""
        value = self.values[name]
        if not isinstance(value, list) or len(value) < length:
            self.fail(f"{name} must list one value for each of the {length} layers")
        for item in value[:length]:
            if item not in known:
                self.fail(f"{name} has {item!r}; known: {', '.join(map(str, known))}")
        return value[:length]


def _schedule(fields: _Fields) -> tuple[str, ...]:
    layers = fields.integer("num_hidden_layers")
    if fields.values.get("layer_types") is not None:
        return tuple(_LAYER_TYPES[name] for name in fields.list("layer_types", layers, tuple(_LAYER_TYPES)))
    if fields.values.get("compress_ratios") is None:
        fields.fail(
            "the field 'layer_types' (or 'compress_ratios') is missing; take the config.json that came with the weights"
        )
    return tuple(_KIND_OF_RATIO[ratio] for ratio in fields.list("compress_ratios", layers, tuple(_KIND_OF_RATIO)))


def _hash_layers(fields: _Fields, layers: int) -> int:
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


def _rates(fields: _Fields, schedule: tuple[str, ...]) -> tuple[int, int]:
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


def _mtp_layers(fields: _Fields) -> int:
    """Return 0 or 1. MTP layers after the first are ignored; transformers ignores all of them."""
    count = fields.get("num_nextn_predict_layers", 0)
    if type(count) is not int or count < 0:
        fields.fail(f"num_nextn_predict_layers is {count!r}, which is no count")
    return min(count, 1)


def _token(fields: _Fields, name: str, default: int) -> int | None:
    """Return a token id, or None if the field is null. A missing field has transformers' default."""
    value = fields.values.get(name, default)
    if value is not None and not _is_token(value):
        fields.fail(f"{name} is {value!r:.60}; it must be a token id or null")
    return value


def _tokens(fields: _Fields, name: str, default: int) -> int | tuple[int, ...] | None:
    """Return a token id like `_token`, or several as a tuple. A list of one is a token id, an empty list is null."""
    value = fields.values.get(name, default)
    if isinstance(value, list) and len(value) != 1:
        if not all(map(_is_token, value)):
            fields.fail(f"{name} is {value!r:.60}; it must be a token id, a list of them or null")
        return tuple(value) or None
    value = value[0] if isinstance(value, list) else value
    if value is not None and not _is_token(value):
        fields.fail(f"{name} is {value!r:.60}; it must be a token id, a list of them or null")
    return value


def _is_token(value) -> bool:
    return type(value) is int and value >= 0


def _dtype(fields: _Fields, own: str | None) -> str:
    """Return the dtype of activations. float16 becomes float32, which holds it exactly while bfloat16 does not."""
    name = own or fields.values.get("dtype") or fields.values.get("torch_dtype") or "bfloat16"
    known = {"bfloat16": "bfloat16", "float32": "float32", "float16": "float32"}
    if not isinstance(name, str) or name not in known:
        fields.fail(f"dtype is {name!r}; known: {', '.join(known)}")
    return known[name]


def _rope_dim(fields: _Fields) -> int:
    if fields.values.get("partial_rotary_factor") is None:
        return fields.integer("qk_rope_head_dim")
    return _rotary_dim(fields, fields.values["partial_rotary_factor"])


def _rotary_dim(fields: _Fields, factor) -> int:
    """Return the number of rotary channels of a head from their fraction of `head_dim`."""
    if fields.check_number("partial_rotary_factor", factor) > 1:
        fields.fail(f"partial_rotary_factor is {factor!r}; a head has no more rotary channels than channels")
    return int(fields.integer("head_dim") * factor)


def _rotary_factor(model: Model) -> float:
    """Return a fraction f with int(head_dim * f) == qk_rope_head_dim, which is how transformers uses it."""
    factor = model.qk_rope_head_dim / model.head_dim
    return factor if int(model.head_dim * factor) == model.qk_rope_head_dim else math.nextafter(factor, 1.0)


def _rope(fields: _Fields, own: dict) -> RoPE:
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


def _check_shares(fields: _Fields, parts: tuple[dict, ...]) -> None:
    """Check that `main` and `compress` rotate as many channels as in the rest of the file."""
    for part in parts:
        share = part.get("partial_rotary_factor", fields.values.get("partial_rotary_factor"))
        if share is None:  # transformers would rotate all channels, but only in `main` layers
            fields.fail("rope_parameters lack partial_rotary_factor; set it to qk_rope_head_dim / head_dim")
        if _rotary_dim(fields, share) != _rope_dim(fields):
            fields.fail("partial_rotary_factor differs inside rope_parameters; v4jax has one for all layers")


def _yarn(fields: _Fields, compress: dict, own: dict) -> dict:
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


def _attention_factor(fields: _Fields, yarn: dict, factor: float) -> float:
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
