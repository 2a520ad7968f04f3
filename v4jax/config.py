"""The one configuration tree: frozen dataclasses, read from Python files, checked once.

A config file defines `get_config(arg="") -> Config` and imports only this module. On the command line
`--config=tiny` names a packaged file, `--config=path/to/file.py:arg` (or `path/to/file`) any other, and
`--config.train.steps=200` overrides a field with its own type (see `v4jax/cli.py`).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import math
import pathlib
import typing
from dataclasses import dataclass, field

from v4jax.core import config_limits
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path


class ConfigError(UserError):
    """A configuration that cannot mean anything; the message names the field and the cure."""


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding (spec 2.3). Layers without compression use `theta` and no YaRN."""

    rope_theta: float = 10_000.0
    compress_rope_theta: float = 160_000.0
    yarn_factor: float = 1.0  # 1 switches YaRN off
    yarn_original: int = 65_536
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0


@dataclass(frozen=True)
class Indexer:
    """Lightning indexer of the CSA layers (spec 2.6)."""

    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512


@dataclass(frozen=True)
class MoE:
    """Mixture of experts (spec 3). The first `num_hash_layers` layers choose experts by token id."""

    n_routed_experts: int = 256
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 2048
    n_shared_experts: int = 1
    num_hash_layers: int = 3
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0


@dataclass(frozen=True)
class HyperConnection:
    """Manifold-constrained hyper-connections (spec 4): `streams` copies of the residual."""

    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6


LAYER_KINDS = ("swa", "csa", "hca")
MODALITIES = ("text",)  # kinds of input that this version's models read


@dataclass(frozen=True)
class Model:
    """Shape of a DeepSeek-V4 model. `layer_types` names the attention kind of every backbone layer."""

    vocab_size: int = 129_280
    hidden_size: int = 4096
    layer_types: tuple[str, ...] = ()
    num_attention_heads: int = 64
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    sliding_window: int = 128
    compress_rate_csa: int = 4
    compress_rate_hca: int = 128
    max_position_embeddings: int = 1_048_576
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 1
    initializer_range: float = 0.02
    bos_id: int | None = 0  # None: no token begins a text
    eos_id: int | tuple[int, ...] | None = 1  # None: no token ends a text; a tuple: any of them does
    dtype: str = "bfloat16"  # of activations and matrix products; norms, router, mHC, softmax are float32
    kv_qdq: bool = False  # simulate FP8 entries and FP4 index keys (spec 2.4); transformers does not
    modalities: tuple[str, ...] = MODALITIES  # of one token stream; any other than text is refused in this version
    engram_layers: tuple[int, ...] = ()  # layers with n-gram tables; any is refused in this version
    rope: RoPE = field(default_factory=RoPE)
    indexer: Indexer = field(default_factory=Indexer)
    moe: MoE = field(default_factory=MoE)
    mhc: HyperConnection = field(default_factory=HyperConnection)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a text."""
        return () if self.eos_id is None else (self.eos_id,) if isinstance(self.eos_id, int) else tuple(self.eos_id)

    @property
    def num_hidden_layers(self) -> int:
        """Number of backbone layers (MTP not counted)."""
        return len(self.layer_types)

    def compress_rate(self, kind: str) -> int:
        """Tokens per compressed entry of a layer kind; 0 for pure sliding window."""
        return {"swa": 0, "csa": self.compress_rate_csa, "hca": self.compress_rate_hca}[kind]

    @property
    def alignment(self) -> int:
        """Documents packed into one row start at multiples of this, so no entry pools two of them."""
        return math.lcm(*(self.compress_rate(kind) for kind in set(self.layer_types) - {"swa"}))


SOURCES = ("shakespeare-kjv", "needle")  # what `Data.source` may name besides files


@dataclass(frozen=True)
class Data:
    """Where the text comes from and how it is cut into rows."""

    source: str = "shakespeare-kjv"  # the embedded corpus, "needle" (data/needle.py), or a path / glob of .txt, .jsonl
    heldout: str = ""  # path / glob for evaluation; "" takes the corpus' own held-out split, or every 50th document
    tokenizer: str = "auto"  # "auto": the packaged BPE; else a tokenizer.json
    seq_len: int = 256
    questions: int = 8  # source "needle": asked at the end of each row
    on_change: str = "refuse"  # resuming a run on other data: refuse, or restart: read the new data from its first row


@dataclass(frozen=True)
class Train:
    """Optimization (spec 8.1, 8.3). Learning rates are peaks of a warm-up and cosine schedule."""

    steps: int = 1000
    max_seconds: float = 0.0  # fewer steps (half at least) where these would take longer; 0: never (time_budget.py)
    batch_size: int = 8
    lr: float = 1e-2  # matrices (Muon)
    adam_lr: float = 1e-2  # embedding, head, norms, biases (AdamW)
    final_lr: float = 0.1  # fraction of the peak at the last step
    warmup: int = 50
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    mtp_loss_weight: float = 0.3
    balance_loss_weight: float = 1e-4
    indexer_loss_weight: float = 1.0
    bias_update_speed: float = 1e-3
    scan: bool = False  # hold repeated layers stacked and scan them: long models compile, small ones run faster without
    remat: bool = False  # keep only the streams between layers for the backward pass: a third more work, less memory
    offload: tuple[str, ...] = ()  # to host memory between uses: optimizer (its state), streams (what remat keeps)
    matmul_precision: str = "plain"  # or "fp8": products of the matrices that are released in FP8 (spec 8.4)
    expert_weight_format: str = "plain"  # or "mxfp4": rounded in the forward pass, and in what is made of a checkpoint
    spike_action: str = (
        "off"  # a step whose loss or gradient is no number or far too large: off (no number ends the run),
    )
    #                     skip (it changes nothing), rollback (and after too many, back to the last checkpoint)
    spike_factor: float = 8.0  # too large: as many spreads above the median of the last steps; 0: only no number is
    spike_window: int = 64  # how many last steps, of those taken
    spike_patience: int = 5  # spikes in a row that are too many: `skip` then ends the run
    hang_timeout_s: float = 0.0  # without an ended step after which all stacks are written out; 0: never
    exit_on_hang: bool = False  # and then end with status 75, for the launcher to start the run again
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0  # 0: only at the end
    eval_rows: int = 64
    checkpoint_every: int = 200
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class Serve:
    """Limits of one generation engine."""

    max_num_seqs: int = 8  # sequences that decode together
    max_model_len: int = 4096  # prompt and new tokens
    max_num_batched_tokens: int = 512  # most tokens of a prompt that are read between two decode steps
    num_speculative_tokens: int = 0  # drafted by the MTP layer and verified in each step
    batch_invariant: bool = False  # a request's tokens do not depend on what else runs, on chunks or on prefix hits
    quantization: str = "none"  # of the large matrices: none, or fp8 (see models/quantize.py)


@dataclass(frozen=True)
class Cache:
    """The KV cache of one engine."""

    kv_cache_dtype: str = "auto"  # auto (the dtype of the model), bf16, fp8, fp8_fp4 (see cache/kv_cache_spec.py)
    block_size: int = 0  # tokens of a page; 0: the least multiple of the compression ratios from 256 on
    kv_cache_tokens: int = 0  # room for this many tokens of all sequences together; 0: for max_num_seqs of the longest
    enable_prefix_caching: bool = True  # find the blocks of earlier requests that began alike
    num_state_snapshots: int = (
        16  # checkpoint records kept for that, one at each prompt's and output's last block boundary
    )
    snapshot_interval_blocks: int = 0  # and one every so many blocks of a prompt
    kv_cache_memory_bytes: int = 0  # bytes of accelerator memory for all of that; 0: as `tokens` says
    kv_device_entries: int = (
        0  # entries a CSA layer that stay there, the ones picked last; all are in host memory, HCA tails too
    )
    kv_host_bytes: int = 0  # bytes of host memory for what leaves the device; 0: none
    kv_disk_bytes: int = 0  # bytes of files in `directory` for it; 0: none
    kv_dir: str = ""
    kv_eviction_policy: str = (
        "s3fifo"  # what goes first from a full host or disk: s3fifo, lru (see cache/offload/eviction.py)
    )
    kv_admission_policy: str = (
        "all"  # what moves to host and disk: all, or second: what more than one request asked for
    )
    kv_load_timeout_s: float = 0.5  # seconds without progress after which a request no longer waits for host and disk


MESH_AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")  # slowest network first


@dataclass(frozen=True)
class Mesh:
    """Devices by axis. The layout's `fill` axis, where it is left at 1, takes the devices that the others leave."""

    rules: str = ""  # of configs/sharding, or a file; "": one device
    slice: int = 1  # whole slices (pods), joined by the data-center network
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1


ShardingRule = tuple[str, tuple[str, ...]]  # a logical axis and the mesh axes that split it, major first


@dataclass(frozen=True)
class ShardingRules:
    """Which mesh axes split which logical axes (`core/axes.py`); what no rule names is whole on every device."""

    name: str
    fill: str
    weights: tuple[ShardingRule, ...] = ()  # of parameters with two axes or more; vectors are whole everywhere
    activations: tuple[ShardingRule, ...] = ()  # batch, token, vocab


@dataclass(frozen=True)
class Config:
    """Everything one run needs."""

    name: str = "unnamed"
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    serve: Serve = field(default_factory=Serve)
    cache: Cache = field(default_factory=Cache)
    mesh: Mesh = field(default_factory=Mesh)


# --- reading and writing -----------------------------------------------------------------------------------------


def to_dict(config) -> dict:
    """Plain nested dict of a config (or of one of its parts); tuples stay tuples."""
    return dataclasses.asdict(config)


def from_dict(cls, values: dict, path: str = ""):
    """Build `cls` from a nested dict. An unknown field raises ConfigError naming the nearest one."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    kwargs = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {path + near[0]!r}?" if near else f"; known fields: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown config field {path + key!r}{hint}")
        hint_type = hints[key]
        if dataclasses.is_dataclass(hint_type):
            if not isinstance(value, dict):
                raise ConfigError(f"config field {path + key!r} is {value!r}, and must be a group of fields")
            value = from_dict(hint_type, value, f"{path}{key}.")
        elif isinstance(value, list):
            value = tuple(value)
        kwargs[key] = value
    return cls(**kwargs)


def preset_names() -> list[str]:
    """Names that `--config=` accepts without a path, those of benchmarks as `bench/NAME`."""
    return _stems(_preset_dir()) + [f"bench/{name}" for name in _stems(_preset_dir() / "bench")]


def preset_summaries() -> dict[str, str]:
    """The first sentence of each preset's docstring, by name; no preset is run."""
    sentences = {}
    for name in preset_names():
        module = ast.parse((_preset_dir() / f"{name}.py").read_text(encoding="utf-8"))
        sentences[name] = " ".join((ast.get_docstring(module) or "").split("\n\n")[0].split())
    return sentences


def sharding_names() -> list[str]:
    """Names that `--config.mesh.rules=` accepts without a path."""
    return _stems(_preset_dir() / "sharding")


def load(spec: str) -> Config:
    """Read a config by preset name or file path, with an optional `:arg` passed to its get_config.

    Raises ConfigError for an unknown name (with the nearest one) or a file without `get_config`.
    """
    name, _, arg = spec.partition(":")
    return validate(_function(name, _preset_dir(), "get_config", "config")(arg))


def load_sharding(name: str) -> ShardingRules:
    """Read a rule table by its name in configs/sharding, or by file path. Raises ConfigError as `load` does."""
    return _function(name, _preset_dir() / "sharding", "get_sharding", "sharding")()


def _function(name: str, directory: pathlib.Path, function: str, what: str):
    """`function` of the preset `name` in `directory`, or of the file of that path."""
    path = pathlib.Path(name) if name.endswith(".py") else directory / f"{name}.py"
    if not path.is_file() and not name.endswith(".py"):
        path = pathlib.Path(f"{name}.py")  # `--config=mine` beside mine.py; the name of a preset is always the preset
    if not path.is_file():
        known = preset_names() if what == "config" else _stems(directory)
        near = difflib.get_close_matches(name.removesuffix(".py"), known, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}?" if near else f"{what}s: {', '.join(known)}"
        raise ConfigError(f"no {what} {name!r}; {hint}")
    module_spec = importlib.util.spec_from_file_location(f"v4jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ConfigError(f"{path} does not define {function}")
    return getattr(module, function)


def _stems(directory: pathlib.Path) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.py") if not path.stem.startswith("_"))


def _preset_dir() -> pathlib.Path:
    """The presets: `configs/` beside the package in a checkout, `v4jax/_configs` in an installed wheel."""
    package = pathlib.Path(__file__).resolve().parent
    return package / "_configs" if (package / "_configs").is_dir() else package.parent / "configs"


# --- validation --------------------------------------------------------------------------------------------------


def validate(config: Config) -> Config:
    """Return `config` unchanged, or raise ConfigError with one line that names the field and the cure."""
    check_values(config)
    _validate_model(config.model)
    _validate_mesh(config.mesh)
    check_serving(config.model, config.serve, config.cache)
    train, data = config.train, config.data
    for name, path in [
        ("data.source", data.source),
        ("data.heldout", data.heldout),
        ("data.tokenizer", data.tokenizer),
        ("cache.kv_dir", config.cache.kv_dir),
        ("mesh.rules", config.mesh.rules),
    ]:
        local_path(path, name)
    _require("streams" not in train.offload or train.remat, "train.offload names streams: set train.remat=true too")
    _require(
        not train.offload or config.mesh.rules,
        "train.offload needs a mesh, of one device if need be: set mesh.rules=fsdp",
    )
    for name, size in [
        ("hidden_size", config.model.hidden_size),
        ("moe.moe_intermediate_size", config.model.moe.moe_intermediate_size),
    ]:
        _require(
            train.expert_weight_format == "plain" or size % 32 == 0,
            f"train.expert_weight_format=mxfp4 takes groups of 32, and model.{name} is {size}",
        )
    _require(
        data.seq_len % config.model.alignment == 0,
        f"data.seq_len {data.seq_len} must be a multiple of {config.model.alignment}, as all compression ratios divide it",
    )
    return config


def check_values(part, path: str = "") -> None:
    """Raise ConfigError for a value of a wrong type, or outside the range that `core.config_limits` gives its field.

    path: dotted name of the part in a Config, with a dot at its end, such as "model."; "" for a whole Config.
    """
    if found := config_limits.problem(part, path):
        raise ConfigError(found)


def check_serving(model: Model, serve: Serve, cache: Cache) -> None:
    """Raise ConfigError for limits of an engine and a cache that contradict each other or the model."""
    check_values(serve, "serve.")
    check_values(cache, "cache.")
    _require(
        serve.max_model_len <= model.max_position_embeddings,
        f"serve.max_model_len {serve.max_model_len} exceeds "
        f"model.max_position_embeddings {model.max_position_embeddings}",
    )
    _require(
        not serve.num_speculative_tokens or model.num_nextn_predict_layers,
        "serve.num_speculative_tokens needs a model with an MTP layer, and this one has none; set it to 0",
    )
    _require(
        not (serve.num_speculative_tokens and serve.batch_invariant),
        "serve.batch_invariant and serve.num_speculative_tokens exclude each other: drafts change the shapes computed",
    )
    _require(
        bool(cache.kv_disk_bytes) == bool(cache.kv_dir),
        "cache.kv_disk_bytes and cache.kv_dir go together: a cache on disk "
        "needs its size and its place (--kv_disk_bytes=64GiB --kv_dir=DIR)",
    )
    _require(
        cache.enable_prefix_caching or not (cache.kv_host_bytes or cache.kv_disk_bytes),
        "cache.kv_host_bytes and cache.kv_disk_bytes hold blocks that requests "
        "share: set cache.enable_prefix_caching to true, or drop them",
    )


def _validate_model(m: Model) -> None:
    _require(len(m.layer_types) > 0, "model.layer_types is empty; give one of swa, csa, hca per layer")
    for kind in m.layer_types:
        _require(kind in LAYER_KINDS, f"model.layer_types has {kind!r}; layers are one of {', '.join(LAYER_KINDS)}")
    _require(
        m.num_attention_heads % m.o_groups == 0,
        f"model.num_attention_heads {m.num_attention_heads} is not a multiple of model.o_groups {m.o_groups}",
    )
    _require(
        m.qk_rope_head_dim % 2 == 0 and m.qk_rope_head_dim <= m.head_dim,
        f"model.qk_rope_head_dim {m.qk_rope_head_dim} must be even and at most head_dim",
    )
    _require(
        m.qk_rope_head_dim <= m.indexer.index_head_dim or "csa" not in m.layer_types,
        f"model.indexer.index_head_dim {m.indexer.index_head_dim} is below model.qk_rope_head_dim {m.qk_rope_head_dim}",
    )
    _require(
        m.compress_rate_csa >= 2 or "csa" not in m.layer_types,
        f"model.compress_rate_csa must be at least 2, got {m.compress_rate_csa}",
    )
    _require(
        m.compress_rate_hca >= 1 or "hca" not in m.layer_types,
        f"model.compress_rate_hca must be at least 1, got {m.compress_rate_hca}",
    )
    _require(
        1 <= m.moe.num_experts_per_tok <= m.moe.n_routed_experts,
        f"model.moe.num_experts_per_tok {m.moe.num_experts_per_tok} must lie in 1..{m.moe.n_routed_experts}",
    )
    _require(
        0 <= m.moe.num_hash_layers <= m.num_hidden_layers,
        f"model.moe.num_hash_layers {m.moe.num_hash_layers} exceeds {m.num_hidden_layers} layers",
    )
    for kind in m.modalities:
        _require(kind in MODALITIES, f"model.modalities has {kind!r}; this version reads {', '.join(MODALITIES)} only")
    _require(m.modalities != (), "model.modalities is empty; a model reads at least text")
    _require(not m.engram_layers, f"model.engram_layers is {m.engram_layers}; this version has no Engram, leave it ()")
    if m.kv_qdq:
        L = m.indexer.index_head_dim
        _require(
            m.head_dim > m.qk_rope_head_dim and L & (L - 1) == 0,
            f"model.kv_qdq needs head_dim above qk_rope_head_dim, and indexer.index_head_dim {L} to be a power of two",
        )


def _validate_mesh(mesh: Mesh) -> None:
    for axis in MESH_AXES:
        size = getattr(mesh, axis)
        _require(
            size == 1 or mesh.rules,
            f"mesh.{axis} is {size}, but no layout says what to split; set mesh.rules "
            f"to one of {', '.join(sharding_names())}",
        )


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)
