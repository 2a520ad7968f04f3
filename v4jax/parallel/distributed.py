"""Multi-process runs: detection of the launcher, and the only call of `jax.distributed.initialize`.

`detect_process` reads the variables that a launcher sets in the environment (Slurm, Open MPI, a JobSet on GKE, TPU
VMs, or JAX's own variables). `initialize` joins the run. A single process does not start `jax.distributed`.
"""

from __future__ import annotations

import contextlib
import functools
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

PORT = 29_400  # coordinator port if neither the launcher nor the user sets one
_GONE = re.compile("Gloo|connection|peer|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|coordination", re.I)
_HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as dead


class ProcessInfo(NamedTuple):
    """A process of a multi-process run, as its launcher describes it.

    Attributes:
        launcher: name of the launcher that set the variables, for messages.
        coordinator: "host:port" of process 0. None on TPU hosts, where JAX finds coordinator, count and index itself.
        count: number of processes; None on TPU hosts.
        index: index of this process, from 0; None on TPU hosts.
        devices: indices of the local accelerators that this process uses. None takes all that it sees.
    """

    launcher: str
    coordinator: str | None
    count: int | None
    index: int | None
    devices: tuple[int, ...] | None = None


def detect_process(environment: Mapping[str, str]) -> ProcessInfo | None:
    """Detect a multi-process run from environment variables.

    The order is JAX's own variables, Open MPI, a Slurm step, TPU hosts. The launcher closest to the process takes
    precedence, because mpirun inside a Slurm job leaves the variables of both.

    Args:
        environment: the environment variables.

    Returns:
        This process, or None if it is the only one.

    Raises:
        UserError: the variables are incomplete or malformed.
    """
    for find in (_plain, _open_mpi, _slurm, _tpu):
        if process := find(environment):
            return process if process.count is None or process.count > 1 else None
    return None


def _plain(env: Mapping[str, str]) -> ProcessInfo | None:
    """Read JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (in a JobSet JOB_COMPLETION_INDEX)."""
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
    """Read the variables of mpirun.

    OMPI_MCA_orte_hnp_uri (PMIX_SERVER_URI* since Open MPI 5) holds the address of mpirun's daemon on the first host.
    """
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    count = _number(env["OMPI_COMM_WORLD_SIZE"])
    uri = env.get("OMPI_MCA_orte_hnp_uri") or next(
        (env[name] for name in sorted(env) if name.startswith("PMIX_SERVER_URI")), ""
    )
    host = re.search(r"tcp[46]?://\[?([^],:]+)", uri)
    local = _number(env.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    single = local == count  # then use the loopback: the daemon's address may only be reachable from outside
    if single:
        address = "127.0.0.1"
    elif host:
        address = host[1]
    else:
        raise UserError("mpirun left no address of its first host; set JAX_COORDINATOR_ADDRESS=HOST:PORT (mpirun -x)")
    return ProcessInfo(
        "Open MPI",
        _with_port(address, env),
        count,
        _number(env["OMPI_COMM_WORLD_RANK"]),
        _own_devices(env, local, _number(env.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))),
    )


def _slurm(env: Mapping[str, str]) -> ProcessInfo | None:
    """Read the variables of a Slurm step.

    srun starts a step. A shell of sbatch or salloc has no SLURM_STEP_NODELIST and is a single process.
    """
    if "SLURM_STEP_NODELIST" not in env or "SLURM_PROCID" not in env:
        return None
    # The job id selects one of the last 4,096 ports, so that two jobs on one host use different ports.
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
    """Return the number of tasks of this step on this node: entry SLURM_NODEID of a list such as "4(x2),3"."""
    tasks = []
    for entry in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        number, _, times = entry.partition("(x")
        tasks += [_number(number)] * _number(times.rstrip(")") or "1")
    return tasks[min(_number(env.get("SLURM_NODEID", "0")), len(tasks) - 1)]


def _tpu(env: Mapping[str, str]) -> ProcessInfo | None:
    """Detect several TPU hosts of a TPU VM or of GKE.

    Coordinator, count and index stay None, so that `initialize` skips `rendezvous`: on a TPU VM only the metadata
    server knows them, and with several slices libtpu numbers the processes. JAX reads both. A host that does not start
    therefore ends the others with JAX's own message.
    """
    hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    many = len(hosts) > 1 or _number(env.get("MEGASCALE_NUM_SLICES", "1")) > 1
    return ProcessInfo("TPU", None, None, None) if many else None


def _own_devices(env: Mapping[str, str], local: int, index: int) -> tuple[int, ...] | None:
    """Return the accelerators of one process on a host, as local indices.

    None (all that it sees) is right for the only process on its host, and for a process that sees only its own
    accelerators (SLURM_GPUS_PER_TASK or SLURM_TRES_PER_TASK). Otherwise the visible accelerators are divided evenly.
    If their number is unknown, each process gets one.

    Args:
        env: the environment variables.
        local: number of processes on this host.
        index: index of this process among them.

    Raises:
        UserError: the number of visible accelerators is not a multiple of `local`.
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
    """Return the first host of a Slurm node list: "node[003,007-9],x" gives "node003".

    Raises:
        UserError: the list is empty or malformed.
    """
    match = re.match(r"([^,\[]+)(?:\[([^],-]+)[^]]*\]([^,]*))?", nodes)
    if match is None:
        raise UserError(f"the launcher's environment has {nodes!r} where a list of hosts belongs")
    return match[1] + (match[2] or "") + (match[3] or "")


def _with_port(address: str, env: Mapping[str, str]) -> str:
    return address if re.search(r":\d+$", address) else f"{address}:{env.get('JAX_COORDINATOR_PORT', PORT)}"


def _number(text: str) -> int:
    if not text.strip().isdecimal():
        raise UserError(f"the launcher's environment has {text!r} where a number belongs")
    return int(text)


def initialize(process: ProcessInfo | None, timeout: int) -> None:
    """Join the run. Call it before anything touches a device.

    JAX's heartbeats detect a process that dies later within 30 s. A collective that breaks detects it at once (see
    `peer_errors`).

    Args:
        process: this process. None, a single process, does nothing.
        timeout: seconds to wait for all processes.

    Raises:
        UserError: not all processes have joined after `timeout` seconds, or they disagree (see `rendezvous`). Every
            process that joined raises it.
    """
    if process is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # affects the CPU backend only
    join = functools.partial(
        jax.distributed.initialize, initialization_timeout=timeout, heartbeat_timeout_seconds=_HEARTBEAT
    )
    if process.coordinator is None:
        join()
        return
    rendezvous(process, timeout)
    devices = list(process.devices) if process.devices else None
    join(process.coordinator, process.count, process.index, devices, cluster_detection_method="deactivate")


def rendezvous(process: ProcessInfo, timeout: float) -> None:
    """Wait until all processes have called this with the same number of processes.

    JAX's own client ends the process with a stack trace if a peer does not join, so this check runs first. The other
    processes send their index and count to process 0 over a socket at the coordinator's address. Process 0 answers
    all of them with the outcome.

    Args:
        process: this process, with a coordinator.
        timeout: seconds to wait.

    Raises:
        UserError: processes are missing after `timeout` seconds (the message names them), two processes were started
            with different counts or the same index, or process 0 was not reached. Every process that joined raises it.
    """
    assert process.coordinator is not None
    host, port = process.coordinator.rsplit(":", 1)
    end = time.monotonic() + timeout
    try:
        answer = _gather(int(port), process, end) if process.index == 0 else _report(host, int(port), process, end)
    except OSError as error:
        raise UserError(
            f"process {process.index} of {process.count} ({process.launcher}) did not reach process 0 at "
            f"{process.coordinator} within {timeout:g} s ({error}); see that it runs and the address leads to it, or "
            "raise --join_timeout"
        ) from error
    if answer.startswith("missing "):
        missing = answer.removeprefix("missing ")
        raise UserError(
            f"after {timeout:g} s process {missing} of {process.count} had not come to "
            f"{process.coordinator}; see why it did not start, or raise --join_timeout"
        )
    if answer:
        raise UserError(answer)


def _gather(port: int, process: ProcessInfo, end: float) -> str:
    """Wait, as process 0, for the other processes and send all of them the answer.

    Returns:
        The answer: "" if all processes have joined, "missing 1, 2" if some have not by time `end` (of
        `time.monotonic`), else the message of `_wrong`.
    """
    assert process.count is not None  # it is known where the coordinator is
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    came: dict[int, socket.socket] = {}
    peers, wrong = [], ""
    with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6) as server:
        while not wrong and len(came) < process.count - 1 and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            # Ignore connections that do not send two numbers: they are not from a process of the run.
            with contextlib.suppress(TimeoutError, ConnectionError, ValueError):
                peer = server.accept()[0]
                peer.settimeout(5)
                index, count = map(int, peer.makefile().readline().split())
                peers.append(peer)
                wrong = _wrong(process, index, count, came)
                came[index] = peer
    missing = ", ".join(str(index) for index in range(1, process.count) if index not in came)
    answer = wrong or (f"missing {missing}" if missing else "")
    for peer in peers:
        with peer, contextlib.suppress(OSError):  # a process that has gone needs no answer
            peer.sendall(f"{answer}\n".encode())
    return answer


def _wrong(process: ProcessInfo, index: int, count: int, came: Mapping[int, socket.socket]) -> str:
    """Return why a peer that reports `index` and `count` cannot join process 0, or "" if it can.

    `came` maps the indices that have joined to their sockets.
    """
    if count != process.count:
        return (
            f"process {index} was started as one of {count} processes, process 0 as one of {process.count}; "
            "start all of them with the same number"
        )
    if not 0 < index < count or (index in came and not _is_closed(came[index])):
        return f"two processes were started as process {index} of {count}; give each an index of its own"
    return ""


def _is_closed(peer: socket.socket) -> bool:
    """Whether the peer has closed its end, as happens when a process is restarted while process 0 still waits."""
    peer.setblocking(False)
    try:
        return peer.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        peer.settimeout(5)


def _report(host: str, port: int, process: ProcessInfo, end: float) -> str:
    """Report index and count to process 0, as any other process, and return its answer.

    Failed connections are retried every 0.2 s until time `end` (of `time.monotonic`), then OSError is raised.
    """
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())) as lead:
                lead.sendall(f"{process.index} {process.count}\n".encode())
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
    """Whether this process writes the files of which a run has one, such as metrics, plots and summaries."""
    return jax.process_index() == 0


def preempted(step: int) -> bool:
    """Whether all processes stop after this step because one of them received SIGTERM.

    Every process must call this after every step. A single process gets False.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Turn a collective that breaks because a peer has died into a one-line message and exit code 75.

    75 is EX_TEMPFAIL, on which a launcher starts the run again. A peer that ended because of a UserError has printed it
    and has exit code 1. Other runtime errors, and all errors of a single process, are raised unchanged.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if jax.process_count() == 1 or not _GONE.search(text):
            raise
        # os._exit skips the shutdown barrier: other processes may still compute, and this exit ends them too.
        print(
            f"v4jax: another process of this run is gone ({text[:120]}); start all of them again, they go on from "
            "the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(os.EX_TEMPFAIL)


def barrier(name: str) -> None:
    """Wait until every process has called this with the same name. A single process does not wait."""
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):  # the training loop disallows transfers
            multihost_utils.sync_global_devices(name)


def all_gather_bytes(data: bytes) -> list[bytes]:
    """Gather bytes from all processes. Every process must call this at the same point.

    Args:
        data: bytes of this process, of any length.

    Returns:
        The bytes of every process, by process index.
    """
    if jax.process_count() == 1:
        return [data]
    with jax.transfer_guard("allow"):  # the training loop disallows transfers
        sizes = multihost_utils.process_allgather(np.int32(len(data)))
        if not sizes.any():
            return [b""] * len(sizes)
        room = 1 << int(sizes.max() - 1).bit_length()  # a power of two, so that few programs are compiled
        rows = multihost_utils.process_allgather(np.frombuffer(data.ljust(room, b"\0"), np.uint8))
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
