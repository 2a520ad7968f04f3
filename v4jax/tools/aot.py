"""The real program of a step, compiled ahead of time for TPUs with none present, and what the compiler says of it.

Most of a compile is machine code for thousands of small kernels. It is done at the compiler's lowest effort for running
time, which chooses buffers and collectives by the same passes: on the gradient of two layers of `tiny`, by hand, at
half the time and with 0.84 times the temporaries. Or it is left out (`stage="buffers"`, see `tools.buffers`).
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np

from v4jax.config import Config, Mesh
from v4jax.core.errors import UserError
from v4jax.core.reporting import print_table
from v4jax.tools import aot_steps, xla_dump
from v4jax.tools.cost_model import Workload
from v4jax.tools.topology import Topology, size

EFFORT = {"exec_time_optimization_effort": -1.0}
_WIDTH = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
_KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute")


class NoRoom(UserError):
    """A whole program that the compiler refuses for want of device memory."""


@dataclasses.dataclass(frozen=True)
class CompiledReport:
    """Of one device: bytes by part on it and in host memory, the largest array among the temporaries (bytes, type),
    and bytes of collectives by kind (loop bodies times their trips, where the compiler knows them). seconds: of CPUs,
    to lower and compile until `stage`. Of a whole program alone, as XLA reports them: cost, operations and bytes
    touched (loop bodies counted once); memory, bytes of the arguments that are updated in place, and the most that is
    in use at once."""

    device_bytes: dict[str, int]
    host_bytes: dict[str, int]
    largest: tuple[int, str]
    limit: int
    collectives: dict[str, float]
    seconds: float
    stage: str
    cost: tuple[float, float] | None = None
    memory: tuple[int, int] | None = None


def devices(topology: Topology) -> list[jax.Device]:
    """Devices of the topology, good for compiling alone. Raises UserError without libtpu, or for an unknown shape."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would wait for a metadata server that is not here
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # or it allows one process a machine: no chip is used
    from jax.experimental import topologies

    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(f"{topology.chip.name}:{topology.shape}", "tpu", **options).devices)
    except (ImportError, jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError, ValueError) as error:
        cause = " ".join(str(error).split())[:160]
        raise UserError(
            f"cannot compile for {topology.name}: {cause}; install v4jax[tpu] (libtpu), or add --analytic"
        ) from error


def compile_step(
    config: Config,
    topology: Topology,
    mesh: Mesh,
    work: Workload,
    stage: str = "program",
    on: Sequence[jax.Device] | None = None,
    options: dict = EFFORT,
) -> CompiledReport:
    """Compile the step of `work.mode` on `mesh`, for devices `on` (default: the topology's), with compiler `options`.

    stage "program": to its end; "buffers": in another process and for the topology's devices, until the buffers are
    placed. There a step that no device has room for is not refused: its bytes say so. Raises NoRoom if the compiler
    finds no room for a whole program, and UserError as `tools.steps` does.
    """
    if stage == "buffers":
        found, seconds = xla_dump.placed(_write, config, topology, mesh, work)
        return CompiledReport(
            found.device_bytes,
            found.host_bytes,
            found.largest,
            topology.device_memory,
            collective_bytes(found.text),
            seconds,
            stage,
        )
    begun = time.process_time()
    lowered = _lower(config, topology, mesh, work, on)
    with tempfile.TemporaryDirectory(prefix="v4jax-plan-") as directory:
        program = _compile(lowered, topology, options | {"xla_dump_to": directory})
        found = xla_dump.read(directory)
    memory, cost = program.memory_analysis(), program.cost_analysis()
    # Its temporaries are not taken: they may be a third more than what the compiler itself counts against the device's
    # memory when it refuses a program, which is what the buffers take.
    parts = found.device_bytes | {"program": memory.generated_code_size_in_bytes}
    return CompiledReport(
        parts,
        found.host_bytes,
        found.largest,
        topology.device_memory,
        collective_bytes(program.as_text()),
        time.process_time() - begun,
        stage,
        (cost.get("flops", 0.0), cost.get("bytes accessed", 0.0)),
        (memory.alias_size_in_bytes, memory.peak_memory_in_bytes),
    )


def _lower(config, topology, mesh, work, on=None) -> jax.stages.Lowered:
    build = aot_steps.train if work.mode == "train" else aot_steps.serve
    return build(config, mesh, work, devices(topology) if on is None else on).lower()


def _compile(lowered: jax.stages.Lowered, topology: Topology, options: dict) -> jax.stages.Compiled:
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        raise NoRoom(f"the compiler finds no room on {topology.name}: {text[:240]}; take a larger one") from error


def _write(directory: str, config: Config, topology: Topology, mesh: Mesh, work: Workload) -> None:
    """Have the compiler write what it makes of a step."""
    _compile(_lower(config, topology, mesh, work), topology, EFFORT | {"xla_dump_to": directory})


def records(result: CompiledReport, at: dict) -> list[dict]:
    """Flat records, beside those of the closed form."""

    def record(metric, value, unit, **more):
        return {"suite": "plan", "metric": metric, "value": value, "unit": unit} | at | {"stage": result.stage} | more

    total = sum(result.device_bytes.values())
    flops, traffic = result.cost or (None, None)
    rough = {"part": "one device, loop bodies once"}
    return [
        record("device_bytes", total, "B", part="total"),
        *(record("device_bytes", value, "B", part=part) for part, value in result.device_bytes.items()),
        record("device_bytes_limit", result.limit, "B"),
        *(record("host_bytes", value, "B", part=part) for part, value in result.host_bytes.items()),
        record("largest_temporary", result.largest[0], "B", part=result.largest[1]),
        *(
            [record("flops_per_step", flops, "1", **rough), record("bytes_per_step", traffic, "B", **rough)]
            if result.cost
            else []
        ),
        *(record("collective_bytes", value, "B", part=part) for part, value in result.collectives.items()),
        record("fits", int(total <= result.limit), "1"),
        record("compile_seconds", result.seconds, "s"),
    ]


def show(results: dict[str, CompiledReport], topology: Topology) -> None:
    """The compiler's numbers as a table, a column for each of the programs compared."""
    one = next(iter(results.values()))
    done = {"program": "compiled", "buffers": "compiled until its buffers were placed"}[one.stage]
    took = ", ".join(f"{result.seconds:.0f} s" for result in results.values())
    rows = []
    for where in ("device_bytes", "host_bytes"):
        parts = [getattr(result, where) for result in results.values()]
        name = where.removesuffix("_bytes")
        rows += [[f"{name}: {part}", *(size(each[part]) for each in parts)] for part in parts[0]]
        rows.append([f"{name}: total", *(size(sum(each.values())) for each in parts)])
    share = lambda result: f"{sum(result.device_bytes.values()) / result.limit:.1%}"
    most = lambda result: f"{size(result.largest[0])} {result.largest[1].split('{')[0]}"
    rows.append(["of the device's memory", *map(share, results.values())])
    rows.append(["largest temporary", *map(most, results.values())])
    title = f"{done} for {topology.name} in {took} of a core, at the lowest effort for running time"
    print_table(title, ["of a device", *results], rows)
    kinds = dict.fromkeys(kind for result in results.values() for kind in result.collectives)
    rows = [[kind, *(size(r.collectives.get(kind, 0)) for r in results.values())] for kind in kinds]
    print_table("collectives of a device and step, bytes of results", ["kind", *results], rows)
    for name, result in results.items():
        verdict = "fits" if sum(result.device_bytes.values()) <= result.limit else "does not fit"
        print(f"compiled, {name}: {verdict}")


def collective_bytes(text: str) -> dict[str, float]:
    """Bytes of the results of each kind of collective in optimized HLO, a loop's body counted once a trip.

    Trips come from `known_trip_count`, or from the one constant that the loop's condition compares with. A loop whose
    trips are data counts as not run: of those that send, these are the further rounds of experts that are too busy.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if not line.startswith(" ") and (match := re.match(r"(ENTRY )?%?([\w.\-]+)[^=]*\{$", line.strip())):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif name:
            bodies[name].append(line)
    totals: dict[str, float] = {}

    def walk(name: str, times: float) -> None:
        for line in bodies.get(name, ()):
            match = re.search(r"= (.+?) ([\w\-]+)\(", line)
            if not match:
                continue
            kind = match[2].removesuffix("-start")
            if kind in _KINDS:
                totals[kind] = totals.get(kind, 0.0) + times * _largest(match[1])
            inner = _trips(line, bodies) if kind == "while" else 1
            for called in re.findall(r"(?:body|calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
                walk(called, times * inner)

    walk(entry, 1.0)
    return totals


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = "\n".join(bodies.get(re.search(r"condition=%?([\w.\-]+)", line)[1], ()))
    constants = re.findall(r"s32\[\]\S* constant\((\d+)\)", condition)
    return int(constants[0]) if len(constants) == 1 and "direction=LT" in condition else 0


def _largest(shapes: str) -> float:
    """Bytes of the largest array in a result's type: of a started collective that is the result itself."""
    sizes = [0.0]
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        if kind in _WIDTH:
            sizes.append(float(_WIDTH[kind] * np.prod([int(d) for d in dims.split(",") if d], dtype=np.float64)))
    return max(sizes)
