"""How the processes of a run find each other: the only place that starts `jax.distributed`.

`where` reads what a launcher left in the environment (Slurm, Open MPI, a JobSet on GKE, TPU VMs, or JAX's own
variables) and `start` joins the run. One process alone starts nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from v4jax.core.errors import UserError

PORT = 29_400  # of the coordinator where neither the launcher nor the user names one
_GONE = re.compile("Gloo|connection|peer|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|coordination", re.I)
_HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead


class ProcessInfo(NamedTuple):
    """This process among those of a run.

    launcher: who said so. coordinator: "host:port" of process 0; None where JAX asks the TPU's metadata for all of it.
    devices: local accelerators that are this process' own; None: all that it sees.
    """

    launcher: str
    coordinator: str | None
    count: int | None
    index: int | None
    devices: tuple[int, ...] | None = None


def detect_process(environment: Mapping[str, str]) -> ProcessInfo | None:
    """The place that `environment` gives this process; None for a process alone. Raises UserError if it is incomplete.

    First JAX's own variables, then Open MPI, then a Slurm step, then TPU hosts: what was set closest to the process
    counts (mpirun inside a Slurm job leaves both).
    """
    for find in (_plain, _open_mpi, _slurm, _tpu):
        if place := find(environment):
            return place if place.count is None or place.count > 1 else None
    return None


def _plain(env: Mapping[str, str]) -> ProcessInfo | None:
    """JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (a JobSet gives the last as JOB_COMPLETION_INDEX)."""
    if "JAX_COORDINATOR_ADDRESS" not in env:
        return None
    index = env.get("JAX_PROCESS_ID", env.get("JOB_COMPLETION_INDEX"))
    if "JAX_NUM_PROCESSES" not in env or index is None:
        raise UserError("JAX_COORDINATOR_ADDRESS is set, but JAX_NUM_PROCESSES or JAX_PROCESS_ID is not; set all three")
    devices = env.get("JAX_LOCAL_DEVICE_IDS")
    return ProcessInfo(
        "environment",
        _with_port(env["JAX_COORDINATOR_ADDRESS"], env),
        _number(env["JAX_NUM_PROCESSES"]),
        _number(index),
        tuple(map(_number, devices.split(","))) if devices else None,
    )


def _open_mpi(env: Mapping[str, str]) -> ProcessInfo | None:
    """mpirun: the address of its daemon on the first host is in OMPI_MCA_orte_hnp_uri (PMIX_SERVER_URI* since 5)."""
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    count = _number(env["OMPI_COMM_WORLD_SIZE"])
    uri = env.get("OMPI_MCA_orte_hnp_uri") or next(
        (env[name] for name in sorted(env) if name.startswith("PMIX_SERVER_URI")), ""
    )
    host = re.search(r"tcp[46]?://\[?([^],:]+)", uri)
    local = _number(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    single = local == count  # all on this host: its daemon's address may be one that only leads outside
    if not host and not single:
        raise UserError("mpirun left no address of its first host; set JAX_COORDINATOR_ADDRESS=HOST:PORT (mpirun -x)")
    return ProcessInfo(
        "Open MPI",
        _with_port("127.0.0.1" if single else host[1], env),
        count,
        _number(env["OMPI_COMM_WORLD_RANK"]),
        _own_devices(env, local, _number(env.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))),
    )


def _slurm(env: Mapping[str, str]) -> ProcessInfo | None:
    """A step that srun started; a shell of sbatch or salloc has no SLURM_STEP_NODELIST and is a process alone."""
    if "SLURM_STEP_NODELIST" not in env or "SLURM_PROCID" not in env:
        return None
    # The port follows from the job, so that two jobs that share a host do not meet: the last 4,096 ones.
    port = env.get("JAX_COORDINATOR_PORT", str(65_536 - 4096 + _number(env["SLURM_JOB_ID"]) % 4096))
    count = _number(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
    local = _slurm_local_tasks(env)
    return ProcessInfo(
        "Slurm",
        f"{first_host(env['SLURM_STEP_NODELIST'])}:{port}",
        count,
        _number(env["SLURM_PROCID"]),
        _own_devices(env, local, _number(env.get("SLURM_LOCALID", "0"))),
    )


def _slurm_local_tasks(env: Mapping[str, str]) -> int:
    """Tasks of this step on this node: entry SLURM_NODEID of a list such as "4(x2),3"."""
    tasks = []
    for entry in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        number, _, times = entry.partition("(x")
        tasks += [_number(number)] * _number(times.rstrip(")") or "1")
    return tasks[min(_number(env.get("SLURM_NODEID", "0")), len(tasks) - 1)]


def _tpu(env: Mapping[str, str]) -> ProcessInfo | None:
    """Several TPU hosts, of a TPU VM or of GKE; JAX reads the rest from the same variables or the metadata server."""
    hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    many = len(hosts) > 1 or _number(env.get("MEGASCALE_NUM_SLICES", "1")) > 1
    return ProcessInfo("TPU", None, None, None) if many else None


def _own_devices(env: Mapping[str, str], local: int, index: int) -> tuple[int, ...] | None:
    """Accelerators of one of `local` processes on a host.

    A process alone on its host has all of them, and so has one whose launcher shows it only its own
    (SLURM_GPUS_PER_TASK). Else those that are visible are dealt out evenly; where their number is unknown, one each.
    """
    if local == 1 or any(name in env for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK")):
        return None
    visible = env.get("CUDA_VISIBLE_DEVICES", env.get("SLURM_STEP_GPUS", ""))
    number = len([device for device in visible.split(",") if device])
    if number == 0:
        return (index,)
    if number % local:
        raise UserError(f"{local} processes on one host cannot share {number} devices; start as many as divide them")
    each = number // local
    return tuple(range(index * each, (index + 1) * each))


def first_host(nodes: str) -> str:
    """First host of a Slurm list: "node[003,007-9],x" -> "node003"."""
    match = re.match(r"([^,\[]+)(?:\[([^],-]+)[^]]*\]([^,]*))?", nodes)
    return match[1] + (match[2] or "") + (match[3] or "")


def _with_port(address: str, env: Mapping[str, str]) -> str:
    return address if re.search(r":\d+$", address) else f"{address}:{env.get('JAX_COORDINATOR_PORT', PORT)}"


def _number(text: str) -> int:
    if not text.strip().isdigit():
        raise UserError(f"the launcher's environment has {text!r} where a number belongs")
    return int(text)


def initialize(place: ProcessInfo | None, timeout: int) -> None:
    """Join the run at `place` before anything touches a device; None: a process alone, nothing to do.

    Raises UserError, in every process that came, if not all have after `timeout` seconds. A process that dies later is
    noticed within half a minute (JAX's heartbeats, or at once by a collective that breaks; see `peers`).
    """
    if place is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of the CPU backend alone
    options = {"initialization_timeout": timeout, "heartbeat_timeout_seconds": _HEARTBEAT}
    if place.coordinator is None:
        jax.distributed.initialize(**options)
        return
    rendezvous(place, timeout)
    devices = list(place.devices) if place.devices else None
    jax.distributed.initialize(
        place.coordinator, place.count, place.index, devices, cluster_detection_method="deactivate", **options
    )


def rendezvous(place: ProcessInfo, timeout: float) -> None:
    """Return when all processes have called this with the same number of processes.

    JAX's own client ends the process with a stack trace when a peer does not come, hence this meeting before it: the
    others tell process 0 their index and their count over a socket at the coordinator's address, and it tells them how
    the meeting ended.

    Raises UserError, in every process that came: after `timeout` seconds, naming who is missing; at once if two
    processes were started with different counts or with the same index.
    """
    host, port = place.coordinator.rsplit(":", 1)
    end = time.monotonic() + timeout
    try:
        answer = _gather(int(port), place, end) if place.index == 0 else _report(host, int(port), place, end)
    except OSError as error:
        raise UserError(
            f"process {place.index} of {place.count} ({place.launcher}) did not reach process 0 at {place.coordinator} "
            f"within {timeout:g} s ({error}); see that it runs and the address leads to it, or raise --join_timeout"
        ) from error
    if answer.startswith("missing "):
        missing = answer.removeprefix("missing ")
        raise UserError(
            f"after {timeout:g} s process {missing} of {place.count} had not come to "
            f"{place.coordinator}; see why it did not start, or raise --join_timeout"
        )
    if answer:
        raise UserError(answer)


def _gather(port: int, place: ProcessInfo, end: float) -> str:
    """Process 0: wait for the others and tell all of them the answer, which is returned.

    It is "" if all have come, "missing 1, 2" if some have not, else what is wrong with those that came.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    came: dict[int, socket.socket] = {}
    peers, wrong = [], ""
    with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6) as server:
        while not wrong and len(came) < place.count - 1 and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            # A line that is not two numbers is no peer's.
            with contextlib.suppress(TimeoutError, ConnectionError, ValueError):
                peer = server.accept()[0]
                peer.settimeout(5)
                index, count = map(int, peer.makefile().readline().split())
                peers.append(peer)
                wrong = _wrong(place, index, count, came)
                came[index] = peer
    missing = ", ".join(str(index) for index in range(1, place.count) if index not in came)
    answer = wrong or (f"missing {missing}" if missing else "")
    for peer in peers:
        with peer, contextlib.suppress(OSError):  # one that went away notices by itself
            peer.sendall(f"{answer}\n".encode())
    return answer


def _wrong(place: ProcessInfo, index: int, count: int, came: Mapping[int, socket.socket]) -> str:
    """Why a peer that says it is process `index` of `count` cannot join process 0; "" if it can."""
    if count != place.count:
        return (
            f"process {index} was started as one of {count} processes, process 0 as one of {place.count}; "
            "start all of them with the same number"
        )
    if not 0 < index < count or (index in came and not _is_closed(came[index])):
        return f"two processes were started as process {index} of {count}; give each an index of its own"
    return ""


def _is_closed(peer: socket.socket) -> bool:
    """Whether the other end is gone, as that of a process which was restarted while the others still gather."""
    peer.setblocking(False)
    try:
        return peer.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        peer.settimeout(5)


def _report(host: str, port: int, place: ProcessInfo, end: float) -> str:
    """Any other process: say that it is here and wait for the answer of process 0."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())) as lead:
                lead.sendall(f"{place.index} {place.count}\n".encode())
                lead.settimeout(max(0.1, end - time.monotonic()) + 5)
                answer = lead.makefile().readline()
                if not answer:
                    raise ConnectionError("it ended")
                return answer.strip()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def is_primary() -> bool:
    """Whether this process writes what a run has one of: metrics, plots, summaries."""
    return jax.process_index() == 0


def preempted(step: int) -> bool:
    """Whether any process was asked to stop (SIGTERM) and this is the step after which all of them do.

    Called after every step, by every process; alone, False.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Inside, a collective that breaks because a peer is gone is one clear line instead of a traceback."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if jax.process_count() == 1 or not _GONE.search(text):
            raise
        # The others of the run may still compute; leaving without their consent is what ends them too.
        print(
            f"v4jax: another process of this run is gone ({text[:120]}); start all of them again, they go on from "
            "the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def barrier(name: str) -> None:
    """Wait until every process is here; alone, nothing."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_gather_bytes(data: bytes) -> list[bytes]:
    """What every process gives, by process. All call it at the same point; alone, it is what was given."""
    if jax.process_count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    if not sizes.any():
        return [b""] * len(sizes)
    room = 1 << int(sizes.max() - 1).bit_length()  # so that there are few programs
    rows = multihost_utils.process_allgather(np.frombuffer(data.ljust(room, b"\0"), np.uint8))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
