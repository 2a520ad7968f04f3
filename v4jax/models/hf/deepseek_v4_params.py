"""The tensors of model_type `deepseek_v4`: released names (spec 9.1) and module names of transformers (spec 12.3)."""

from v4jax.models.hf.param_rules import ParamRule, ParamRules, same

# Besides the module names, three further spellings occur in files of transformers' save_pretrained, because its reverse
# renaming keeps embed_tokens.weight and hc_head.hc_* unchanged and writes attn.norm for attn.kv_norm.
_ROOT = (
    ParamRule("embed.table", "VD", "embed.weight", "V D", same("embed_tokens.weight", axes="V D")),
    ParamRule("head.weight", "DV", "head.weight", "V D", same("lm_head.weight", axes="V D")),
    ParamRule("norm.scale", "D", "norm.weight", "D", role="norm"),
)
_HEAD_MHC = (
    ParamRule("head_mhc.fn", "YXD", "hc_head_fn", "Y XD", same("hc_head.hc_fn", axes="Y XD"), role="f32"),
    ParamRule("head_mhc.base", "Y", "hc_head_base", "Y", same("hc_head.hc_base", axes="Y"), role="f32"),
    ParamRule("head_mhc.scale", "1", "hc_head_scale", "1", same("hc_head.hc_scale", axes="1"), role="f32"),
)
_LAYER = (
    ParamRule("attn_norm.scale", "D", "attn_norm.weight", "D", same("input_layernorm.weight", axes="D"), role="norm"),
    ParamRule(
        "ffn_norm.scale", "D", "ffn_norm.weight", "D", same("post_attention_layernorm.weight", axes="D"), role="norm"
    ),
    ParamRule("attn_mhc.fn", "MXD", "hc_attn_fn", "M XD", same("attn_hc.fn", axes="M XD"), role="f32"),
    ParamRule("attn_mhc.base", "M", "hc_attn_base", "M", same("attn_hc.base", axes="M"), role="f32"),
    ParamRule("attn_mhc.scale", "3", "hc_attn_scale", "3", same("attn_hc.scale", axes="3"), role="f32"),
    ParamRule("ffn_mhc.fn", "MXD", "hc_ffn_fn", "M XD", same("ffn_hc.fn", axes="M XD"), role="f32"),
    ParamRule("ffn_mhc.base", "M", "hc_ffn_base", "M", same("ffn_hc.base", axes="M"), role="f32"),
    ParamRule("ffn_mhc.scale", "3", "hc_ffn_scale", "3", same("ffn_hc.scale", axes="3"), role="f32"),
    # attention
    ParamRule("attn.q_down", "DQ", "attn.wq_a.weight", "Q D", same("self_attn.q_a_proj.weight", axes="Q D")),
    ParamRule(
        "attn.q_norm.scale", "Q", "attn.q_norm.weight", "Q", same("self_attn.q_a_norm.weight", axes="Q"), role="norm"
    ),
    ParamRule("attn.q_up", "QNH", "attn.wq_b.weight", "NH Q", same("self_attn.q_b_proj.weight", axes="NH Q")),
    ParamRule("attn.kv", "DH", "attn.wkv.weight", "H D", same("self_attn.kv_proj.weight", axes="H D")),
    ParamRule(
        "attn.kv_norm.scale",
        "H",
        "attn.kv_norm.weight",
        "H",
        same("self_attn.kv_norm.weight", "attn.norm.weight", axes="H"),
        role="norm",
    ),
    ParamRule("attn.sink", "N", "attn.attn_sink", "N", same("self_attn.sinks", axes="N"), role="f32"),
    ParamRule("attn.o_down", "GIR", "attn.wo_a.weight", "GR I", same("self_attn.o_a_proj.weight", axes="GR I")),
    ParamRule("attn.o_up", "GRD", "attn.wo_b.weight", "D GR", same("self_attn.o_b_proj.weight", axes="D GR")),
    # compressor
    ParamRule(
        "attn.compressor.kv",
        "DW",
        "attn.compressor.wkv.weight",
        "W D",
        same("self_attn.compressor.kv_proj.weight", axes="W D"),
        layers=("csa", "hca"),
    ),
    ParamRule(
        "attn.compressor.gate",
        "DW",
        "attn.compressor.wgate.weight",
        "W D",
        same("self_attn.compressor.gate_proj.weight", axes="W D"),
        layers=("csa", "hca"),
    ),
    ParamRule(
        "attn.compressor.ape",
        "PW",
        "attn.compressor.ape",
        "P W",
        same("self_attn.compressor.position_bias", axes="P W"),
        role="f32",
        layers=("csa", "hca"),
    ),
    ParamRule(
        "attn.compressor.norm.scale",
        "H",
        "attn.compressor.norm.weight",
        "H",
        same("self_attn.compressor.kv_norm.weight", axes="H"),
        role="norm",
        layers=("csa", "hca"),
    ),
    # indexer
    ParamRule(
        "attn.indexer.q_up",
        "QJL",
        "attn.indexer.wq_b.weight",
        "JL Q",
        same("self_attn.compressor.indexer.q_b_proj.weight", axes="JL Q"),
        layers=("csa",),
    ),
    ParamRule(
        "attn.indexer.weight",
        "DJ",
        "attn.indexer.weights_proj.weight",
        "J D",
        same("self_attn.compressor.indexer.scorer.weights_proj.weight", axes="J D"),
        layers=("csa",),
    ),
    ParamRule(
        "attn.indexer.compressor.kv",
        "DW",
        "attn.indexer.compressor.wkv.weight",
        "W D",
        same("self_attn.compressor.indexer.kv_proj.weight", axes="W D"),
        layers=("csa",),
    ),
    ParamRule(
        "attn.indexer.compressor.gate",
        "DW",
        "attn.indexer.compressor.wgate.weight",
        "W D",
        same("self_attn.compressor.indexer.gate_proj.weight", axes="W D"),
        layers=("csa",),
    ),
    ParamRule(
        "attn.indexer.compressor.ape",
        "PW",
        "attn.indexer.compressor.ape",
        "P W",
        same("self_attn.compressor.indexer.position_bias", axes="P W"),
        role="f32",
        layers=("csa",),
    ),
    ParamRule(
        "attn.indexer.compressor.norm.scale",
        "L",
        "attn.indexer.compressor.norm.weight",
        "L",
        same("self_attn.compressor.indexer.kv_norm.weight", axes="L"),
        role="norm",
        layers=("csa",),
    ),
    # experts
    ParamRule("ffn.router.weight", "DE", "ffn.gate.weight", "E D", same("mlp.gate.weight", axes="E D")),
    ParamRule(
        "ffn.router.bias",
        "E",
        "ffn.gate.bias",
        "E",
        same("mlp.gate.e_score_correction_bias", axes="E"),
        role="f32",
        layers=("moe",),
    ),
    ParamRule(
        "ffn.router.table",
        "VK",
        "ffn.gate.tid2eid",
        "V K",
        same("mlp.gate.tid2eid", axes="V K"),
        role="index",
        layers=("hash_moe",),
    ),
    ParamRule(
        "ffn.experts.gate_up",
        "EUDF",
        "ffn.experts.{E}.w{U:1,3}.weight",
        "F D",
        (("mlp.experts.gate_up_proj", "E UF D"),),
    ),
    ParamRule("ffn.experts.down", "EFD", "ffn.experts.{E}.w2.weight", "D F", (("mlp.experts.down_proj", "E D F"),)),
    ParamRule(
        "ffn.shared.gate_up",
        "DUF",
        "ffn.shared_experts.w{U:1,3}.weight",
        "F D",
        (("mlp.shared_experts.{U:gate,up}_proj.weight", "F D"),),
    ),
    ParamRule(
        "ffn.shared.down",
        "FD",
        "ffn.shared_experts.w2.weight",
        "D F",
        same("mlp.shared_experts.down_proj.weight", axes="D F"),
    ),
)
_MTP = (
    ParamRule("embed_norm.scale", "D", "enorm.weight", "D", role="norm"),
    ParamRule("hidden_norm.scale", "D", "hnorm.weight", "D", role="norm"),
    ParamRule("embed_proj", "DO", "e_proj.weight", "O D"),
    ParamRule("hidden_proj", "DO", "h_proj.weight", "O D"),
    ParamRule("norm.scale", "D", "norm.weight", "D", role="norm"),
)

RULES = ParamRules(root=_ROOT + _HEAD_MHC, layer=_LAYER, mtp=_MTP + _HEAD_MHC)
