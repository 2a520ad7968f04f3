"""The configuration tree: frozen dataclasses that are read from Python files and validated once.

A config file defines `get_config(arg="") -> Config` and imports only this module. On the command line
`--config=tiny` names a packaged preset, `--config=path/to/file.py:arg` (or `path/to/file`) names any other file, and
`--config.train.steps=200` overrides a field; the value is parsed with the field's type (see `v4jax/cli.py`).

The comment after a field is its help text: `v4jax train --show_config` prints it beside the field.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
import pathlib
import typing
from dataclasses import dataclass, field

from v4jax.core.config_limits import check_values
from v4jax.core.errors import ConfigError, nearest, suggest
from v4jax.core.layer_spec import LAYER_CHOICES, LayerSpec
from v4jax.core.paths import local_path


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding (spec 2.3). Layers without compression use `rope_theta` and no YaRN."""

    rope_theta: float = 10_000.0  # frequency base of layers without compression (swa)
    compress_rope_theta: float = 160_000.0  # frequency base of layers with compression (csa, hca)
    yarn_factor: float = 1.0  # YaRN context extension factor, in layers with compression only; 1 disables YaRN
    yarn_original: int = 65_536  # context length in tokens before the YaRN extension
    yarn_beta_fast: float = 32.0  # rotations over yarn_original above which YaRN keeps a frequency
    yarn_beta_slow: float = 1.0  # rotations over yarn_original below which YaRN divides a frequency by yarn_factor


@dataclass(frozen=True)
class Indexer:
    """Lightning indexer of the CSA layers (spec 2.6)."""

    index_n_heads: int = 64  # number of indexer heads
    index_head_dim: int = 128  # dimension of an indexer head
    index_topk: int = 512  # compressed entries that a query attends, those with the highest indexer scores


@dataclass(frozen=True)
class MoE:
    """Mixture of experts (spec 3). The first `num_hash_layers` layers choose experts by token id."""

    n_routed_experts: int = 256  # number of routed experts per layer
    num_experts_per_tok: int = 6  # routed experts that process each token
    moe_intermediate_size: int = 2048  # inner dimension of an expert
    n_shared_experts: int = 1  # experts that process every token
    num_hash_layers: int = 3  # number of leading layers that choose experts by token id
    routed_scaling_factor: float = 1.5  # factor on the weights of the routed experts
    swiglu_limit: float = 10.0  # clamp on the gate and up activations of an expert


@dataclass(frozen=True)
class HyperConnection:
    """Manifold-constrained hyper-connections (spec 4): `hc_mult` residual streams."""

    hc_mult: int = 4  # number of residual streams
    hc_sinkhorn_iters: int = 20  # Sinkhorn iterations that make the mixing matrix doubly stochastic
    hc_eps: float = 1e-6  # epsilon of the coefficients and of the Sinkhorn normalization


MODALITIES = ("text",)  # kinds of input that models of this version can read


@dataclass(frozen=True)
class Model:
    """Shape of a DeepSeek-V4 model. `layer_types` names the attention kind of every backbone layer."""

    vocab_size: int = 129_280  # number of token ids
    hidden_size: int = 4096  # dimension of a residual stream
    layer_types: tuple[str, ...] = ()  # attention kind of each backbone layer: swa, csa or hca
    num_attention_heads: int = 64  # number of query heads; all share one key-value head
    head_dim: int = 512  # dimension of an attention head
    qk_rope_head_dim: int = 64  # channels of an attention head that are rotated by RoPE
    q_lora_rank: int = 1024  # rank of the query projection
    o_groups: int = 8  # number of head groups of the output projection
    o_lora_rank: int = 1024  # rank of the output projection, per group
    sliding_window: int = 128  # most recent tokens that every layer attends uncompressed
    compress_rate_csa: int = 4  # tokens per compressed entry of a csa layer
    compress_rate_hca: int = 128  # tokens per compressed entry of an hca layer
    max_position_embeddings: int = 1_048_576  # maximum sequence length in tokens
    rms_norm_eps: float = 1e-6  # epsilon of RMSNorm
    num_nextn_predict_layers: int = 1  # number of MTP layers: 0 or 1
    initializer_range: float = 0.02  # standard deviation of the initial weights
    bos_id: int | None = 0  # token id that begins a text; None: texts have no first token
    eos_id: int | tuple[int, ...] | None = 1  # token id that ends a text, or several; None: no token ends it
    dtype: str = "bfloat16"  # of activations and matmuls: bfloat16, float32; norms, router, mHC and softmax are float32
    kv_qdq: bool = False  # simulate FP8 entries and FP4 index keys (spec 2.4); transformers has no such simulation
    modalities: tuple[str, ...] = MODALITIES  # kinds of input in one token stream; this version accepts text only
    engram_layers: tuple[int, ...] = ()  # layers with n-gram tables (Engram); this version accepts none
    rope: RoPE = field(default_factory=RoPE)
    indexer: Indexer = field(default_factory=Indexer)
    moe: MoE = field(default_factory=MoE)
    mhc: HyperConnection = field(default_factory=HyperConnection)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All token ids that end a text."""
        return () if self.eos_id is None else (self.eos_id,) if isinstance(self.eos_id, int) else tuple(self.eos_id)

    @property
    def num_hidden_layers(self) -> int:
        """Number of backbone layers, without MTP layers."""
        return len(self.layer_types)

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The parts of each backbone layer. All other modules read these instead of the fields behind them."""
        hashed = self.moe.num_hash_layers
        return tuple(
            LayerSpec(kind, "hash_moe" if i < hashed else "moe", engram=i in self.engram_layers)
            for i, kind in enumerate(self.layer_types)
        )

    @property
    def mtp_layers(self) -> tuple[LayerSpec, ...]:
        """The parts of the layer inside each MTP layer (spec 5.1)."""
        return (LayerSpec("swa", "moe"),) * self.num_nextn_predict_layers

    def compress_rate(self, kind: str) -> int:
        """Tokens per compressed entry of an attention kind; 0 for "swa", which has only the sliding window."""
        return {"swa": 0, "csa": self.compress_rate_csa, "hca": self.compress_rate_hca}[kind]

    @property
    def alignment(self) -> int:
        """Packed documents start at multiples of this many tokens, so no entry pools tokens of two documents."""
        return math.lcm(*(self.compress_rate(kind) for kind in set(self.layer_types) - {"swa"}))


SOURCES = ("shakespeare-kjv", "needle")  # values of `Data.source` that are not paths


@dataclass(frozen=True)
class Data:
    """Where the text comes from and how it is cut into rows."""

    source: str = "shakespeare-kjv"  # the embedded corpus, "needle" (data/needle.py), or a path / glob of .txt, .jsonl
    heldout: str = ""  # path / glob of evaluation text; "": the held-out split of the corpus, or every 50th document
    tokenizer: str = "auto"  # "auto": the packaged BPE tokenizer; else the path of a tokenizer.json
    seq_len: int = 256  # tokens per row of a batch
    questions: int = 8  # source "needle": questions at the end of each row
    on_change: str = "refuse"  # if a run resumes on changed data: refuse, or restart at the first row of the new data


@dataclass(frozen=True)
class Train:
    """Optimization (spec 8.1, 8.3). A learning rate is the peak of a schedule of linear warm-up and cosine decay."""

    steps: int = 1000  # optimizer steps of the run
    max_seconds: float = 0.0  # run fewer steps, at least half, if `steps` would take longer than this; 0: no limit
    batch_size: int = 8  # rows per step, over all devices
    lr: float = 1e-2  # matrices (Muon)
    adam_lr: float = 1e-2  # embedding, head, norms, biases (AdamW)
    final_lr: float = 0.1  # learning rate at the last step, as a fraction of the peak
    warmup: int = 50  # steps of linear warm-up of the learning rates
    momentum: float = 0.95  # momentum of Muon
    weight_decay: float = 0.1  # decoupled weight decay
    clip_norm: float = 1.0  # maximum global gradient norm
    mtp_loss_weight: float = 0.3  # weight of the MTP loss
    balance_loss_weight: float = 1e-4  # weight of the expert load-balancing loss
    indexer_loss_weight: float = 1.0  # weight of the indexer loss
    bias_update_speed: float = 1e-3  # change per step of the router bias that balances expert load
    scan: bool = False  # scan over stacked layers: large models compile faster, small models run slower
    remat: bool = False  # rematerialize layers, saving only the streams between them: a third more compute, less memory
    offload: tuple[str, ...] = ()  # kept in host memory between uses: optimizer (its state), streams (saved by remat)
    matmul_precision: str = "plain"  # plain, or fp8: matmuls of the weights that are released in FP8 (spec 8.4)
    expert_weight_format: str = "plain"  # plain, or mxfp4: experts rounded in the forward pass and by loading
    spike_action: str = "off"  # off: NaN/Inf ends the run; skip: drop the step; rollback: drop, later reload
    spike_factor: float = (
        8.0  # a spike exceeds the median log loss or log grad norm by this many spreads; 0: NaN/Inf only
    )
    spike_window: int = 64  # applied steps over which median and spread (1.4826 MAD, at least 0.02) are taken
    spike_patience: int = 5  # consecutive spikes after which `skip` ends the run and `rollback` reloads a checkpoint
    hang_timeout_s: float = 0.0  # dump all Python stacks if no step finishes for this many seconds; 0: never
    exit_on_hang: bool = False  # exit with status 75 after that dump, so that a launcher restarts the run
    seed: int = 0  # seed of the initial weights and of the data order
    log_every: int = 10  # steps between two log lines
    eval_every: int = 0  # steps between two evaluations; 0: only at the end
    eval_rows: int = 64  # held-out rows per evaluation; 0: all
    checkpoint_every: int = 200  # steps between two checkpoints
    keep_checkpoints: int = 2  # number of most recent checkpoints that are kept


@dataclass(frozen=True)
class Serve:
    """Limits of one inference engine."""

    max_num_seqs: int = 8  # maximum number of sequences that decode together, per device
    max_model_len: int = 4096  # maximum tokens of a sequence, prompt and output
    max_num_batched_tokens: int = 512  # maximum prompt tokens that are prefilled between two decode steps
    num_speculative_tokens: int = 0  # draft tokens of the MTP layer that each step verifies
    batch_invariant: bool = False  # outputs do not depend on other requests, on prefill chunks or on prefix cache hits
    quantization: str = "none"  # of the large matrices: none, or fp8 (see models/quantize.py)


@dataclass(frozen=True)
class Cache:
    """The KV cache of one engine."""

    kv_cache_dtype: str = "auto"  # auto (dtype of the model), bf16, fp8, fp8_fp4 (see cache/kv_cache_spec.py)
    block_size: int = 0  # tokens per block; 0: the least multiple of all compression rates that is at least 256
    kv_cache_tokens: int = 0  # capacity in tokens of all sequences together; 0: max_num_seqs * max_model_len
    enable_prefix_caching: bool = True  # reuse blocks of earlier requests that begin with the same tokens
    num_state_snapshots: int = 16  # kept for prefix caching, at the last block boundary of each prompt and output
    snapshot_interval_blocks: int = 0  # blocks between further snapshots within a prompt; 0: none
    kv_cache_memory_bytes: int = 0  # accelerator memory for the KV cache in bytes; 0: as kv_cache_tokens needs
    kv_device_entries: int = 0  # entries per CSA layer kept on the device, others in host memory; 0: all on the device
    kv_host_bytes: int = 0  # host memory in bytes for blocks that are offloaded from the device; 0: none
    kv_disk_bytes: int = 0  # disk space in bytes in kv_dir for offloaded blocks; 0: none
    kv_dir: str = ""  # directory of the offloaded blocks on disk
    kv_eviction_policy: str = "s3fifo"  # of a full host or disk tier: s3fifo, lru (see cache/offload/eviction.py)
    kv_admission_policy: str = "all"  # blocks that are offloaded: all, or second: those that two requests asked for
    kv_load_timeout_s: float = 0.5  # seconds without progress after which a request stops waiting for host and disk


MESH_AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")  # from the slowest network to the fastest


@dataclass(frozen=True)
class Mesh:
    """Devices per mesh axis. If the `fill` axis of the rules is 1, it takes all devices that other axes do not use."""

    rules: str = ""  # sharding rules: a name in configs/sharding or a file; "": one device, no sharding
    slice: int = 1  # slices (TPU pods), connected by the data-center network
    data: int = 1  # data parallelism
    fsdp: int = 1  # data parallelism with sharded weights
    expert: int = 1  # expert parallelism
    context: int = 1  # context parallelism
    tensor: int = 1  # tensor parallelism


ShardingRule = tuple[str, tuple[str, ...]]  # a logical axis and the mesh axes that shard it, major first


@dataclass(frozen=True)
class ShardingRules:
    """The mesh axes that shard each logical axis (`core/axes.py`). An axis without a rule is replicated."""

    name: str  # name of the rules, as in configs/sharding
    fill: str  # mesh axis that takes the devices that no other axis uses
    weights: tuple[ShardingRule, ...] = ()  # of parameters with at least two axes; vectors are replicated
    activations: tuple[ShardingRule, ...] = ()  # of batch, token and vocabulary axes


@dataclass(frozen=True)
class Config:
    """The configuration of one run: model, data, training, serving, KV cache and mesh."""

    name: str = "unnamed"  # name of the config
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    serve: Serve = field(default_factory=Serve)
    cache: Cache = field(default_factory=Cache)
    mesh: Mesh = field(default_factory=Mesh)


# --- reading and writing -----------------------------------------------------------------------------------------


def to_dict(config) -> dict:
    """Convert a config, or one of its groups, to a nested dict. Tuples stay tuples."""
    return dataclasses.asdict(config)


def from_dict(cls, values: dict, path: str = ""):
    """Build a config dataclass from a nested dict.

    Args:
        cls: the dataclass, `Config` or one of its groups.
        values: field values; a group is a dict. Lists become tuples. Missing fields keep their defaults.
        path: dotted name of `cls` in a Config with a trailing dot, such as "model."; used in messages.

    Raises:
        ConfigError: a field is unknown (the message names the nearest known one), or a group is not a dict.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    kwargs = {}
    for key, value in values.items():
        if key not in known:
            near = nearest(key, known)
            hint = f"; did you mean {path + near!r}?" if near else f"; known fields: {', '.join(sorted(known))}"
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
    """Preset names that `--config=` accepts. Benchmark presets are named `bench/NAME`."""
    return _stems(_preset_dir()) + [f"bench/{name}" for name in _stems(_preset_dir() / "bench")]


def preset_summaries() -> dict[str, str]:
    """The first paragraph of each preset's docstring, by preset name. The files are parsed, not executed."""
    sentences = {}
    for name in preset_names():
        module = ast.parse((_preset_dir() / f"{name}.py").read_text(encoding="utf-8"))
        sentences[name] = " ".join((ast.get_docstring(module) or "").split("\n\n")[0].split())
    return sentences


def sharding_names() -> list[str]:
    """Names of sharding rules that `--config.mesh.rules=` accepts."""
    return _stems(_preset_dir() / "sharding")


def load(spec: str) -> Config:
    """Read and validate a config.

    Args:
        spec: a preset name or a file path. An optional suffix `:arg` is passed to `get_config` of the file.

    Raises:
        ConfigError: the name is unknown (the message names the nearest one), the file does not define `get_config`, or
            the config is invalid.
    """
    name, _, arg = spec.partition(":")
    return validate(_function(name, _preset_dir(), "get_config", "config", preset_names())(arg))


def load_sharding(name: str) -> ShardingRules:
    """Read sharding rules by their name in configs/sharding or by file path. Raises ConfigError as `load` does."""
    return _function(name, _preset_dir() / "sharding", "get_sharding", "sharding", sharding_names())()


def _function(name: str, directory: pathlib.Path, function: str, what: str, known: list[str]):
    """Import the preset `name` of `directory`, or the file of that path, and return its attribute `function`."""
    path = pathlib.Path(name) if name.endswith(".py") else directory / f"{name}.py"
    if not path.is_file() and not name.endswith(".py"):
        path = pathlib.Path(f"{name}.py")  # `--config=mine` finds ./mine.py; a preset of that name has precedence
    if not path.is_file():
        raise ConfigError(f"no {what} {name!r}; {suggest(name.removesuffix('.py'), known, f'{what}s', cutoff=0.3)}")
    module_spec = importlib.util.spec_from_file_location(f"v4jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ConfigError(f"{path} does not define {function}")
    return getattr(module, function)


def _stems(directory: pathlib.Path) -> list[str]:
    return sorted(path.stem for path in directory.glob("*.py") if not path.stem.startswith("_"))


def _preset_dir() -> pathlib.Path:
    """Directory of the presets: `configs/` beside the package in a checkout, `v4jax/_configs` in an installed wheel."""
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
        ("name", config.name),  # the default workdir is runs/NAME
        ("data.source", data.source),
        ("data.heldout", data.heldout),
        ("data.tokenizer", data.tokenizer),
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
        f"data.seq_len {data.seq_len} must be a multiple of {config.model.alignment}, "
        "as all compression ratios divide it",
    )
    return config


def check_serving(model: Model, serve: Serve, cache: Cache) -> None:
    """Raise ConfigError if the limits of an engine and its cache contradict each other or the model."""
    check_values(serve, "serve.")
    check_values(cache, "cache.")
    local_path(cache.kv_dir, "cache.kv_dir")
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
        known = LAYER_CHOICES["attention"]
        _require(kind in known, f"model.layer_types has {kind!r}; layers are one of {', '.join(known)}")
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
            f"mesh.{axis} is {size}, but mesh.rules is empty, so nothing is split; set mesh.rules "
            f"to one of {', '.join(sharding_names())}",
        )


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)
