"""Analytic cost model of a plan: memory, traffic and time of a step, computed from shapes and sharding rules only.

Bytes of state are exact, because they come from the sharding rules of a run. Activations, traffic and operations are
sums over the terms that the docstrings name. `tools.plan.UNKNOWN` lists what they omit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from v4jax import config as configs
from v4jax.cache.kv_cache_spec import KVCacheSpec
from v4jax.config import MESH_AXES, Config, Mesh
from v4jax.core.errors import UserError
from v4jax.models.layer_stacks import stacks
from v4jax.models.param_count import count_parameters, parameter_table
from v4jax.nn.linear import FP8_WEIGHT_AXES
from v4jax.parallel.matrix_exchange import group_small, replica_axes
from v4jax.parallel.mesh import sizes
from v4jax.parallel.rules import MeshRules, validate_rules
from v4jax.tools.topology import GIB, Topology, listed
from v4jax.train.optim import MATRICES, NEWTON_SCHULZ_STEPS

_HOST_RUNTIME_BYTES = (
    2 * GIB
)  # of host memory a chip, for programs and transfer buffers: an allowance, not a measurement
MODES = ("train", "prefill", "decode")


@dataclass(frozen=True)
class Workload:
    """The step to plan.

    Attributes:
      mode: "train", "prefill" or "decode".
      context: Tokens of a row.
      rows: Batch size in training, else number of concurrent sequences.
    """

    mode: str
    context: int
    rows: int

    @property
    def tokens(self) -> int:
        """Tokens that one step computes."""
        return self.rows if self.mode == "decode" else self.rows * self.context


@dataclass(frozen=True)
class CostEstimate:
    """Costs of one step. `device_bytes`, `traffic` and `links` are bytes of one device, by part."""

    device_bytes: dict[str, float]
    host_bytes: float
    flops: float  # operations of all devices together, without recomputation
    device_flops: float  # operations of one device, with recomputation
    traffic: dict[str, float]
    links: dict[str, dict[str, float]]  # bytes sent, by network (`Chip.links`) and part
    seconds: dict[str, float]  # time of compute, of memory and of each network; the maximum is the step's lower bound
    mfu: float

    @property
    def collectives(self) -> dict[str, float]:
        """Bytes sent by part, over both networks."""
        fast, slow = self.links.values()
        return {part: fast[part] + slow[part] for part in fast}


class Collectives:
    """Bytes that one device sends, by the network that carries them and by part.

    The devices of a mesh are numbered axis by axis, and each `domain` consecutive devices share the fast network. A
    group of devices along some mesh axes spans `domains` domains and has `inside` members in each.
    """

    def __init__(self, sharding: MeshRules, topology: Topology):
        self.sharding, self.domain = sharding, topology.domain
        self.links = {name: defaultdict(float) for name in topology.chip.links}

    def group(self, axes: Sequence[str]) -> tuple[int, int]:
        """Return (inside, domains) of the group along the mesh axes `axes`."""
        inside = stride = 1
        for axis in reversed(MESH_AXES):
            size = self.sharding.mesh.shape[axis]
            if axis in axes:
                inside *= math.gcd(size, max(1, self.domain // stride))
            stride *= size
        return inside, self.sharding.size(axes) // inside

    def gather(self, part: str, size: float, axes: Sequence[str]) -> None:
        """Count an all-gather whose result has `size` bytes, or the inverse reduce-scatter.

        A domain sends its share to each other domain once, spread over the network cards of its members, as NCCL's
        rings do; the rest goes over the fast network.
        """
        inside, domains = self.group(axes)
        slow = size * (1 - 1 / domains) / inside
        self._add(part, size * (1 - 1 / (inside * domains)) - slow, slow)

    def exchange(self, part: str, size: float, axes: Sequence[str]) -> None:
        """Count an all-to-all in which a device spreads `size` bytes evenly over its group."""
        inside, domains = self.group(axes)
        slow = size * (1 - 1 / domains)
        self._add(part, size * (1 - 1 / (inside * domains)) - slow, slow)

    def _add(self, part: str, fast: float, slow: float) -> None:
        for link, sent in zip(self.links.values(), (fast, slow), strict=True):
            link[part] += sent


def default_mesh(config: Config, topology: Topology, work: Workload) -> Mesh:
    """Return `config.mesh` if it names a layout, else a default mesh for the topology.

    In training, the default layout is `pod`: expert parallelism over up to 64 devices, rows split over the expert and
    fsdp axes, and the tokens of a row split over the context axis if devices outnumber rows. In serving, the default
    layout is `serve`, with expert parallelism over all devices of a slice.
    """
    if config.mesh.rules:
        return config.mesh
    per_slice = topology.devices // topology.slices
    if work.mode != "train":
        expert = math.gcd(per_slice, config.model.moe.n_routed_experts)
        return Mesh("serve", slice=topology.slices, data=per_slice // expert, expert=expert)
    parts = math.gcd(per_slice, max(work.rows // topology.slices, 1))
    expert = math.gcd(parts, config.model.moe.n_routed_experts, 64)
    return Mesh("pod", slice=topology.slices, expert=expert, fsdp=parts // expert, context=per_slice // parts)


def abstract_sharding(mesh: Mesh, devices: int) -> MeshRules:
    """Return the mesh rules of an abstract mesh, whose devices need not exist."""
    layout = configs.load_sharding(mesh.rules)
    validate_rules(layout)
    return MeshRules(AbstractMesh(sizes(mesh, layout, devices), MESH_AXES), layout)


def parameter_shapes(model: configs.Model) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Return axis letters and shapes of trained parameters by name; hash tables and router biases are not trained."""
    rows = {".".join(path): row for path, row in parameter_table(model).items() if row[2]}
    return {name: letters for name, (letters, _, _) in rows.items()}, {name: row[1] for name, row in rows.items()}


def state_bytes(config: Config, sharding: MeshRules) -> tuple[dict[str, float], float]:
    """Bytes of the training state of one device.

    Weights, gradients and optimizer state are float32 and exact, by the sharding rules. If `train.offload` moves the
    optimizer state to the host, its bytes on the device are an estimate.

    Returns:
      Bytes of device memory by part, and the device's bytes of host memory.
    """
    letters, shapes = parameter_shapes(config.model)
    where = sharding.parameters(letters, shapes)
    numbers = {name: math.prod(where[name].shard_shape(shape)) for name, shape in shapes.items()}
    # Muon keeps one moment, AdamW two.
    moments = {name: 4 * count * (1 if letters[name] in MATRICES else 2) for name, count in numbers.items()}
    weights, optimizer, host = 4 * sum(numbers.values()), sum(moments.values()), 0
    if "optimizer" in config.train.offload:  # on the device: old and new state of the parameter that is being updated
        optimizer, host = 2 * max(moments.values()), optimizer
    return {"weights": weights, "gradients": weights, "optimizer": optimizer}, host


def attention_flops(model: configs.Model, context: float) -> float:
    """Operations of attention for one token that attends to `context` tokens; a multiply-add counts as 2.

    Counted are the two products with the window's keys, the top-k entries (CSA) and all visible entries (HCA), and the
    indexer's scores.
    """
    heads, total = 4 * model.num_attention_heads * model.head_dim, 0.0
    for layer in model.layers:
        seen = min(model.sliding_window, context)
        if layer.attention == "csa":
            entries = context / model.compress_rate_csa
            seen += min(model.indexer.index_topk, entries)
            total += 2 * model.indexer.index_n_heads * model.indexer.index_head_dim * entries
        elif layer.attention == "hca":
            seen += context / model.compress_rate_hca
        total += heads * seen
    return total


def estimate(config: Config, topology: Topology, mesh: Mesh, work: Workload) -> CostEstimate:
    """Estimate the costs of one step.

    Raises:
      UserError: The mode is unknown, or mesh, model and batch do not fit together.
    """
    if work.mode not in MODES:
        raise UserError(f"no mode {work.mode!r}; one of {', '.join(MODES)}")
    sharding = abstract_sharding(mesh, topology.devices)
    build = _train if work.mode == "train" else _serve
    sent = Collectives(sharding, topology)
    parts, traffic, host = build(config, topology, sharding, work, sent)
    counts = count_parameters(config.model)
    mean = work.context if work.mode == "decode" else work.context / 2
    attention = attention_flops(config.model, mean)
    once = 2 * counts.active + attention  # forward pass of one token
    times = 3 if work.mode == "train" else 1  # the backward pass takes twice the operations of the forward pass
    again = 1 if work.mode == "train" and config.train.remat else 0
    flops = times * once * work.tokens
    device_flops = (times + again) * once * work.tokens / topology.devices
    optimizer = _muon(config, sharding, sent) if work.mode == "train" else 0.0
    share8 = _narrow_flops(config) / once if work.mode == "train" else 0.0
    slow = (1 - share8) / topology.chip.flops + share8 / (topology.chip.flops8 or topology.chip.flops)
    seconds = {
        "compute": (device_flops * slow + optimizer / topology.chip.flops) * topology.chip.devices,
        "memory": sum(traffic.values()) / (topology.chip.bandwidth / topology.chip.devices),
    }
    for link, speed in zip(sent.links, (topology.chip.network, topology.chip.slow_network), strict=True):
        seconds[link] = sum(sent.links[link].values()) / (speed / topology.chip.devices)
    bound = max(seconds.values())
    mfu = flops / (bound * topology.chips * topology.chip.flops)
    return CostEstimate(parts, host, flops, device_flops + optimizer, traffic, sent.links, seconds, mfu)


def _narrow_flops(config: Config) -> float:
    """Operations with FP8 operands in the forward pass of one token.

    Only dense matmuls count: routed experts round their operands but multiply them in the original dtype.
    """
    if config.train.matmul_precision != "fp8":
        return 0.0
    rows = parameter_table(config.model).items()
    dense = FP8_WEIGHT_AXES - {"EUDF", "EFD"}
    return 2 * sum(math.prod(shape) for path, (letters, shape, _) in rows if letters in dense and path[0] != "mtp")


# Numbers of simultaneously live copies, counted in the compiled programs of tests/golden/compiled.json: float32 copies
# of dispatched rows in the backward pass, per recomputed layer; copies of the logits; copies of embedding and head.
_ROW_COPIES, _LOGITS, _VOCABULARY = 4.5, 2, 2


def _train(config: Config, topology: Topology, sharding: MeshRules, work: Workload, sent: Collectives):
    """Training: sharded state, saved streams (with remat: between units), the activations of one unit, and logits."""
    m, (parts, host) = config.model, state_bytes(config, sharding)
    moments = host or parts["optimizer"]
    tokens = work.tokens / _token_shards(sharding, work)
    width = jnp.dtype(m.dtype).itemsize
    D, F, K = m.hidden_size, m.moe.moe_intermediate_size, m.moe.num_experts_per_tok
    tensor = sharding.size(sharding.axes("weights", "expert_mlp"))
    streams = tokens * m.mhc.hc_mult * D * width
    inside = _ROW_COPIES * 1.5 * tokens * K * D * 4
    runs = stacks(m, config.train.scan)
    units, longest = sum(run.repeats for run in runs), max(len(run.pattern) for run in runs)
    kept = units * streams + longest * inside if config.train.remat else m.num_hidden_layers * inside
    if "streams" in config.train.offload:  # on the device: those in transfer and those in use
        kept, host = kept - max(units - 2, 0) * streams, host + units * streams
    vocabulary = sharding.size(sharding.axes("weights", "vocab"))
    logits = _LOGITS * tokens * m.vocab_size / vocabulary * 4
    # Experts of one layer, gathered along the hidden axis, and their gradients; the same for embedding and head.
    expert_parts = sharding.size(sharding.axes("weights", "expert")) * tensor
    layer = 3 * D * F * m.moe.n_routed_experts / expert_parts * width
    whole = _VOCABULARY * D * m.vocab_size / vocabulary * 4
    split = sharding.size(sharding.axes("weights", "expert_embed"))
    plain = config.train.matmul_precision == config.train.expert_weight_format == "plain"
    rounded = 0 if plain else layer / width * 4 / split  # a float32 copy of the device's shard of a layer's experts
    parts |= {"activations": kept + logits, "gathered": 2 * layer + whole + rounded}
    passes = 3 if config.train.remat else 2
    traffic = {
        "weights": passes * m.num_hidden_layers * layer,
        "optimizer": 2 * (parts["weights"] + moments),
        "gradients": 2 * parts["gradients"],
        "activations": passes * m.num_hidden_layers * (inside + streams) + 2 * logits,
    }
    travel, split_axes = sharding.axes("weights", "expert"), sharding.axes("weights", "expert_embed")
    dense = (count_parameters(m).total - count_parameters(m).by_group["routed experts"]) * width / tensor
    dense_axes = sharding.axes("weights", "embed")
    journeys = 2 * passes + 1  # dispatch and combine per pass; the backward pass repeats the dispatch
    replicas = [axis for axis in _token_axes(sharding) if axis not in (*travel, *split_axes)]
    sent.gather("all-gather", passes * m.num_hidden_layers * layer, split_axes)
    sent.gather("all-gather", passes * dense, dense_axes)
    sent.gather("reduce-scatter", m.num_hidden_layers * layer, split_axes)
    sent.gather("reduce-scatter", dense, dense_axes)
    sent.gather("all-reduce", 2 * m.num_hidden_layers * layer / split, replicas)
    sent.exchange("all-to-all", m.num_hidden_layers * tokens * K * D * width * journeys, travel)
    return parts, traffic, topology.chip.host * (_HOST_RUNTIME_BYTES + topology.chip.devices * host)


def _muon(config: Config, sharding: MeshRules, sent: Collectives) -> float:
    """Operations of one device that orthogonalize matrices (`parallel/matrix_exchange.py`).

    Adds to `sent` the float32 bytes that gather a matrix on one device, shard it again, and exchange results between
    replicas.
    """
    letters, shapes = parameter_shapes(config.model)
    where, alike = sharding.parameters(letters, shapes), defaultdict(list)
    for name in letters:
        if letters[name] in MATRICES:
            alike[letters[name], shapes[name][-len(letters[name]) :]].append(name)
    operations = 0.0
    for (axes, shape), names in alike.items():
        sides = [[axes.index(letter) for letter in side] for side in MATRICES[axes]]
        fans = sorted(math.prod(shape[axis] for axis in side) for side in sides)
        spec, copies = sharding.weight(axes), replica_axes(sharding, sharding.weight(axes))
        split = [_names(spec, axis) for axis in itertools.chain(*sides)]
        sharers, groups = math.prod(map(sharding.size, split)), sharding.size(copies)
        counts = [math.prod(where[name].shard_shape(shapes[name])) * sharers // math.prod(fans) for name in names]
        turn = sharers * groups  # matrices of one round
        rounds = sum(-(-sum(counts[i] for i in group) // turn) for group in group_small(counts, turn))
        operations += rounds * NEWTON_SCHULZ_STEPS * (4 * fans[0] ** 2 * fans[1] + 2 * fans[0] ** 3)
        size = rounds * 4 * math.prod(fans)
        for along in split:
            sent.exchange("matrices", 2 * size, along)
        sent.gather("matrices", groups * size, copies)
    return operations


def _names(spec: PartitionSpec, axis: int) -> tuple[str, ...]:
    """Mesh axes that split one axis of an array."""
    names = spec[axis] if axis < len(spec) else None
    return (names,) if isinstance(names, str) else names or ()


def _serve(config: Config, topology: Topology, sharding: MeshRules, work: Workload, sent: Collectives):
    """Serving: weights in the model's dtype, the KV cache of all rows, and the activations of one chunk."""
    m, layout = (
        config.model,
        KVCacheSpec(config.model, config.cache.kv_cache_dtype, config.cache.block_size, config.cache.kv_device_entries),
    )
    width = jnp.dtype(m.dtype).itemsize
    letters, shapes = parameter_shapes(m)
    where = sharding.parameters(letters, shapes)
    weights = sum(width * math.prod(where[name].shard_shape(shape)) for name, shape in shapes.items())
    # Each device adds a null block and a null slot; a sequence's last block may be partly filled.
    rows, pages = work.rows / topology.devices, -(-work.context // layout.block_size)
    kv = (1 + rows * pages) * layout.block_bytes + (1 + rows) * layout.state_bytes() + layout.device_cache_bytes
    # A decode step computes one token of every row. Prefill computes a device's rows one by one, each in chunks.
    chunk = min(work.context, config.serve.max_num_batched_tokens)
    tokens, steps = (max(1.0, rows), 1) if work.mode == "decode" else (chunk, rows * -(-work.context // chunk))
    activations = tokens * (
        4 * 4 * m.mhc.hc_mult * m.hidden_size + 12 * m.num_attention_heads * m.head_dim + 4 * m.vocab_size
    )
    parts = {"weights": weights, "kv": kv, "activations": activations}
    experts = count_parameters(m).by_group["routed experts"] * width / topology.devices
    # Share of the experts that a step's tokens select, if tokens spread evenly.
    met = 1 - (1 - m.moe.num_experts_per_tok / m.moe.n_routed_experts) ** (tokens * topology.devices)
    read = weights - experts * (1 - met)
    kinds = [layer.attention for layer in m.layers]
    entry, key, each = layout.entry_bytes, layout.key_bytes if "csa" in kinds else 0, 0.0
    for kind in kinds:
        if kind == "csa":
            each += (
                work.context / m.compress_rate_csa * key
                + min(m.indexer.index_topk, work.context / m.compress_rate_csa) * entry
            )
        elif kind == "hca":
            each += work.context / m.compress_rate_hca * entry
        each += m.sliding_window * m.head_dim * width
    traffic = {
        "weights": steps * read,
        "kv": rows * each if work.mode == "decode" else steps * each / 2,
        "activations": 2 * steps * activations,
    }
    numbers = steps * m.num_hidden_layers * tokens * m.hidden_size
    sent.exchange("all-to-all", numbers * m.moe.num_experts_per_tok * width * 2, sharding.axes("weights", "expert"))
    sent.gather("all-reduce", numbers * 4 * 2 * 2, sharding.axes("weights", "expert_mlp"))
    far = (1 + rows * pages) * layout.host_block_bytes + (1 + rows) * layout.host_state_bytes()
    host = topology.chip.host * (_HOST_RUNTIME_BYTES + topology.chip.devices * far)
    return parts, traffic, host


def _token_shards(sharding: MeshRules, work: Workload) -> int:
    """Number of shards of a step's tokens. Raises UserError if rows or context do not divide evenly."""
    for name, size, letter in (("rows", work.rows, "B"), ("context", work.context, "T")):
        axes = sharding.activation(letter)[0] or ()
        number = sharding.size((axes,) if isinstance(axes, str) else axes)
        if size % number:
            raise UserError(f"{size} {name} cannot be split into the {number} parts of this mesh; choose another mesh")
    return sharding.size(_token_axes(sharding))


def _token_axes(sharding: MeshRules) -> tuple[str, ...]:
    """Mesh axes that split the tokens of a step."""
    return sharding.axes("activations", "batch") + sharding.axes("activations", "token")


def smallest_topology(
    config: Config, topology: Topology, work: Workload, reserve: float
) -> tuple[Topology, CostEstimate] | None:
    """The smallest listed topology of the chip whose estimate leaves the share `reserve` of memory free, or None."""
    for candidate in listed(topology.chip):
        try:
            plain = dataclasses.replace(config, mesh=Mesh())
            found = estimate(plain, candidate, default_mesh(plain, candidate, work), work)
        except UserError:
            continue
        if sum(found.device_bytes.values()) <= candidate.device_memory * (1 - reserve):
            return candidate, found
    return None
