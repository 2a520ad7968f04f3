"""`v4jax plan`: memory, traffic and time that a model needs on a topology, without the hardware.

The analytic cost model answers in a second. For TPUs, the step (of training, decoding, or a chunk of a prefill) is then
compiled ahead of time for the topology, and the compiler's numbers are printed beside the analytic ones.
"""

from __future__ import annotations

import dataclasses

from v4jax.config import MESH_AXES, Config, Mesh
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path
from v4jax.core.reporting import print_table, write_json
from v4jax.models.param_count import count_parameters
from v4jax.tools.cost_model import CostEstimate, Workload, default_mesh, estimate, smallest_topology
from v4jax.tools.topology import TPUS, Topology, parse, size

DOES_NOT_FIT = 3  # exit status of `v4jax plan` if the plan fits none of the given topologies
RESERVE = 0.06  # share of device memory that a plan leaves free for programs, fragmentation and unmodeled arrays
MARGIN = 0.10  # relative error limit of analytic device bytes against the compiler's; held by tests/tools/test_plan.py
UNKNOWN = (
    "It can't know: how evenly tokens spread over experts (even is assumed), how far collectives hide behind products "
    "(the bound takes the longest of compute, memory and either network, as if all overlapped), host input, stragglers "
    "and restarts. The closed form's activations are a sum of the largest arrays, not a schedule: on the flagships' "
    f"steps that were compiled and fit, bytes of a device were within {MARGIN:.0%} and collectives in all within a "
    "factor of 2; of small models tiles and programs take more. The way to host memory is not timed."
)


def run(
    config: Config,
    topology: str,
    mode: str = "train",
    context: int | None = None,
    concurrency: int | None = None,
    analytic: bool = False,
    stage: str = "program",
    json: str | None = None,
) -> list[dict]:
    """Print the plan and return its records.

    With `cache.kv_device_entries`, serving is also compiled without it, for comparison. A program that the compiler
    refuses because memory is too small yields one record, `fits` with value 0.

    Args:
      config: The model and its options.
      topology: A topology as `tools.topology.parse` reads it, or several separated by commas (only with `analytic`).
      mode: "train", "prefill" or "decode".
      context: Tokens of a row; default data.seq_len in training, else serve.max_model_len.
      concurrency: Rows; default train.batch_size in training, else serve.max_num_seqs.
      analytic: Skip the compilation.
      stage: How far TPU programs are compiled, "program" or "buffers" (`tools.aot`).
      json: File to which the records are written.

    Raises:
      UserError: The plan is impossible.
    """
    if json:
        local_path(json, "json")
    places = [parse(name) for name in topology.split(",")]
    if len(places) > 1 and not analytic:
        raise UserError("several topologies are compared in closed form; add --analytic, or name one")
    rows = concurrency or (config.train.batch_size if mode == "train" else config.serve.max_num_seqs)
    tokens = context or (config.data.seq_len if mode == "train" else config.serve.max_model_len)
    work, records, compared = Workload(mode, tokens, rows), [], []
    for place in places:
        mesh = default_mesh(config, place, work)
        found = estimate(config, place, mesh, work)
        at = {
            "config": config.name,
            "topology": place.name,
            "mode": mode,
            "context": tokens,
            "concurrency": rows,
            "precision": config.model.dtype,
        }
        if mode != "train":
            at |= {"cache": config.cache.kv_cache_dtype, "hot": config.cache.kv_device_entries}
        else:
            how = config.train
            at |= {
                "matmul": how.matmul_precision,
                "expert_weights": how.expert_weight_format,
                "offload": ",".join(how.offload),
            }
        least = smallest_topology(config, place, work, RESERVE)
        least = least[0].name if least else "none"
        records += _records(config, place, found, least, at)
        compared.append((place, mesh, found))
    if len(places) > 1:
        _compare(config, work, compared)
    else:
        _print(config, place, mesh, work, found, least)
    if not analytic and place.chip.name in TPUS:
        from v4jax.tools import aot

        results = {}
        for name, one in _arms(config, work).items():
            of_arm = at | ({} if mode == "train" else {"hot": one.cache.kv_device_entries}) | {"source": "compiled"}
            try:
                results[name] = aot.compile_step(one, place, mesh, work, stage)
            except aot.NoRoom as error:
                print(f"compiled, {name}: does not fit; {error}")
                records.append({"suite": "plan", "metric": "fits", "value": 0, "unit": "1", "stage": stage} | of_arm)
                continue
            records += aot.records(results[name], of_arm)
        if results:
            aot.show(results, place)
    elif not analytic:
        print(f"programs for {place.chip.name} are not compiled ahead of time: the numbers are the closed form's")
    print(UNKNOWN)
    if json:
        write_json(json, records)
    return records


def _arms(config: Config, work: Workload) -> dict[str, Config]:
    """Return configs to compile, by column name; with host-resident KV (`cache.kv_device_entries`), also without it."""
    if work.mode == "train" or not config.cache.kv_device_entries:
        return {"compiler": config}
    near = dataclasses.replace(config, cache=dataclasses.replace(config.cache, kv_device_entries=0))
    return {"all on the device": near, f"live, {config.cache.kv_device_entries:,} copies": config}


def fits_anywhere(records: list[dict], config: Config) -> bool:
    """Return whether the plan of `run` fits one of its topologies, by the compiled program if there is one."""
    found = [r for r in records if r["metric"] == "fits"]
    asked = [
        r
        for r in found
        if r["source"] == "compiled" and r.get("hot", config.cache.kv_device_entries) == config.cache.kv_device_entries
    ]
    return any(r["value"] for r in asked or found)


def number(value: float) -> str:
    """Format a count in billions, or in millions if it is below one billion."""
    return f"{value / 1e9:,.2f}B" if value >= 1e9 else f"{value / 1e6:,.2f}M"


def fits(bytes_needed: float, topology: Topology) -> bool:
    """Return whether a device's memory, less the share `RESERVE`, holds `bytes_needed`."""
    return bytes_needed <= topology.device_memory * (1 - RESERVE)


def _records(config: Config, topology: Topology, found: CostEstimate, least: str, at: dict) -> list[dict]:
    counts = count_parameters(config.model)
    total = sum(found.device_bytes.values())

    def record(metric, value, unit, **more):
        return {"suite": "plan", "metric": metric, "value": value, "unit": unit, "source": "analytic", **at, **more}

    return [
        record("parameters_total", counts.total, "1"),
        record("parameters_active", counts.active, "1"),
        record("device_bytes", total, "B", part="total"),
        *(record("device_bytes", value, "B", part=part) for part, value in found.device_bytes.items()),
        record("device_bytes_limit", topology.device_memory, "B"),
        record("host_bytes", found.host_bytes, "B"),
        record("flops_per_step", found.flops, "1"),
        *(record("bytes_per_step", value, "B", part=part) for part, value in found.traffic.items()),
        *(record("collective_bytes", value, "B", part=part) for part, value in found.collectives.items()),
        *(
            record("link_bytes", value, "B", link=link, part=part)
            for link, parts in found.links.items()
            for part, value in parts.items()
        ),
        *(record("step_seconds_bound", value, "s", part=part) for part, value in found.seconds.items()),
        record("step_seconds_bound", max(found.seconds.values()), "s", part="longest"),
        record("mfu_bound", found.mfu, "1"),
        record("fits", int(fits(total, topology)), "1"),
        record("smallest_topology", least, ""),
    ]


def _compare(config: Config, work: Workload, plans: list[tuple[Topology, Mesh, CostEstimate]]) -> None:
    """Print one row per topology: bytes held and sent by a device, lower bound of a step's time, and cost per token."""
    rows = []
    for place, mesh, found in plans:
        held, longest = sum(found.device_bytes.values()), max(found.seconds, key=found.seconds.get)
        bound, sending = found.seconds[longest], max(found.seconds[link] for link in found.links)
        rows.append(
            [
                place.name,
                place.chips,
                _axes(mesh),
                size(held),
                "yes" if fits(held, place) else "no",
                size(sum(found.collectives.values())),
                f"{sending:.4g} s",
                f"{bound:.4g} s",
                longest,
                f"{1e6 * place.chips * bound / work.tokens:,.2f}",
            ]
        )
    print_table(
        f"{config.name}: {work.mode} of {work.rows} x {work.context} tokens, in closed form",
        [
            "topology",
            "chips",
            "mesh",
            "bytes of a device",
            "fits",
            "sent by a device",
            "of that, at least",
            "step, at least",
            "bound by",
            "chip-seconds a million tokens",
        ],
        rows,
    )


def _axes(mesh: Mesh) -> str:
    sizes = [f"{axis} {getattr(mesh, axis)}" for axis in MESH_AXES if getattr(mesh, axis) > 1]
    return ", ".join(sizes) or "one device"


def _print(config: Config, topology: Topology, mesh, work: Workload, found: CostEstimate, least: str) -> None:
    counts, total = count_parameters(config.model), sum(found.device_bytes.values())
    share = lambda value: f"{value / topology.device_memory:.1%}"
    rows = [[part, size(value), share(value)] for part, value in found.device_bytes.items()]
    rows += [["total", size(total), share(total)], ["limit", size(topology.device_memory), f"{RESERVE:.0%} reserved"]]
    title = (
        f"{config.name}: {number(counts.total)} parameters, {number(counts.active)} active; {work.mode} of "
        f"{work.rows} x {work.context} tokens on {topology.name} ({topology.chips} chips, {topology.devices} devices), "
        f"sharding rules {mesh.rules or 'none'} ({_axes(mesh)})"
    )
    print_table(title, ["bytes of a device", "closed form", "of memory"], rows)
    collectives = [
        [f"{link}: {part}", size(value)]
        for link, parts in found.links.items()
        for part, value in parts.items()
        if value
    ]
    traffic = [[f"memory: {part}", size(value)] for part, value in found.traffic.items()]
    print_table("bytes of a device and step", ["", "closed form"], traffic + collectives)
    longest = max(found.seconds, key=found.seconds.get)
    bound = found.seconds[longest]
    print(
        f"{found.flops:.3g} operations a step; at least {bound:.4g} s, bound by {longest} "
        f"({', '.join(f'{part} {value:.4g} s' for part, value in found.seconds.items() if value)}): "
        f"{work.tokens / bound:,.0f} tokens/s, {found.mfu:.1%} MFU; host {size(found.host_bytes)} a host"
    )
    verdict = "fits" if fits(total, topology) else "does not fit"
    print(f"{verdict}; smallest listed {topology.chip.name} that does: {least}")
