"""Ahead-of-time compilation of a step for TPUs that need not be present, and the compiler's numbers about it.

Most of the compile time goes into machine code for thousands of small kernels. The compiler therefore runs at its
lowest effort for execution time, which chooses buffers and collectives by the same passes but shortens the compile
time. `stage="buffers"` omits the machine code (see `tools.xla_dump`).
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
    """The compiler refused a program because device memory is too small."""


@dataclasses.dataclass(frozen=True)
class CompiledReport:
    """The compiler's numbers about the program of one device.

    Attributes:
      device_bytes: Bytes of device memory by part.
      host_bytes: Bytes of host memory by part.
      largest: Bytes and type of the largest temporary array.
      limit: Bytes of memory of one device.
      collectives: Bytes of collectives by kind; loop bodies count once per trip if the trip count is known.
      seconds: CPU seconds to lower and compile until `stage`.
      stage: "program" or "buffers".
      cost: XLA's operations and bytes accessed, loop bodies counted once; None for stage "buffers".
      memory: XLA's bytes of arguments that are updated in place, and peak bytes in use; None for stage "buffers".
    """

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
    """The topology's devices, usable only for compilation.

    Raises:
      UserError: libtpu is not installed, or does not know the shape.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu waits for a metadata server
    # By default libtpu allows one process per machine. No chip is used here, so several are safe.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
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
    """Compile the step of one mode ahead of time.

    Args:
      config: Model and options.
      topology: The chips to compile for.
      mesh: The mesh of the step.
      work: Mode, rows and tokens of the step.
      stage: "program" compiles to the end. "buffers" compiles in another process, for the topology's devices, until
        buffers are assigned; a step that exceeds device memory is then reported instead of refused.
      on: Devices of the mesh; None takes the topology's. Only for stage "program".
      options: XLA compiler options; only for stage "program".

    Raises:
      NoRoom: The compiler refuses the program because device memory is too small.
      UserError: As in `tools.aot_steps`.
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
    # XLA's `memory_analysis` can give more temporaries than the compiler counts against device memory when it refuses a
    # program. The compiler counts the buffer assignment, so that one is used.
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
    """Compile a step and have XLA dump its files to `directory`."""
    _compile(_lower(config, topology, mesh, work), topology, EFFORT | {"xla_dump_to": directory})


def records(result: CompiledReport, at: dict) -> list[dict]:
    """JSON records of the compiler's numbers; `at` holds the fields that all of them share."""

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
    """Print the compiler's numbers as tables with one column per program."""
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
    """Bytes of the results of each kind of collective in optimized HLO; a loop body counts once per trip.

    The trip count is `known_trip_count`, or the only constant that the loop's condition compares with. A loop with a
    data-dependent trip count counts as not executed. The only such loops with collectives are the additional dispatch
    rounds of overloaded experts.
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
    """Bytes of the largest array in an HLO result type; for an asynchronous collective that array is its result."""
    sizes = [0.0]
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        if kind in _WIDTH:
            sizes.append(float(_WIDTH[kind] * np.prod([int(d) for d in dims.split(",") if d], dtype=np.float64)))
    return max(sizes)
