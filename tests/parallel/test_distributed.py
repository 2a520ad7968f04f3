"""How processes find their place: what each launcher leaves, and what is said when a peer is missing."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from v4jax.core.errors import UserError
from v4jax.parallel.distributed import ProcessInfo, detect_process, first_host, initialize, peer_errors, rendezvous

ROOT = pathlib.Path(__file__).parents[2]
SLURM = {
    "SLURM_JOB_ID": "70000",
    "SLURM_STEP_NODELIST": "gpu[007,009-10]",
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "4(x3)",
    "SLURM_LOCALID": "1",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
PORT = 65_536 - 4096 + 70_000 % 4096
JOBSET = {"JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run", "JAX_NUM_PROCESSES": "8", "JOB_COMPLETION_INDEX": "6"}


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, None),  # a shell of sbatch, not a step
        (SLURM, ProcessInfo("Slurm", f"gpu007:{PORT}", 12, 5, (1,))),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, ProcessInfo("Slurm", f"gpu007:{PORT}", 12, 5, (2, 3))),
        (
            SLURM | {"SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "4,5"},
            ProcessInfo("Slurm", f"gpu007:{PORT}", 12, 5),
        ),
        # Alone on its host: all devices.
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "11,1"}, ProcessInfo("Slurm", f"gpu007:{PORT}", 12, 5)),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (
            MPI | {"OMPI_MCA_orte_hnp_uri": "123.0;tcp://10.1.2.3,10.0.0.1:4711"},
            ProcessInfo("Open MPI", "10.1.2.3:29400", 4, 3, (1,)),
        ),
        (
            MPI | {"PMIX_SERVER_URI41": "prterun.0;tcp4://10.9.8.7:5000", "JAX_COORDINATOR_PORT": "1234"},
            ProcessInfo("Open MPI", "10.9.8.7:1234", 4, 3, (1,)),
        ),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, ProcessInfo("Open MPI", "127.0.0.1:29400", 4, 3, (1,))),
        (JOBSET, ProcessInfo("environment", "run-workers-0-0.run:29400", 8, 6)),
        (
            JOBSET | {"JAX_PROCESS_ID": "2", "JAX_LOCAL_DEVICE_IDS": "0,3", **SLURM},
            ProcessInfo("environment", "run-workers-0-0.run:29400", 8, 2, (0, 3)),
        ),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, ProcessInfo("TPU", None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, ProcessInfo("TPU", None, None, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_every_launcher_gives_the_place(environment, place):
    assert detect_process(environment) == place


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES or JAX_PROCESS_ID is not"),
        (JOBSET | {"JOB_COMPLETION_INDEX": "x"}, "'x' where a number belongs"),
        (MPI, "mpirun left no address"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "'' where a list of hosts belongs"),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "4 processes on one host cannot share 3 devices"),
    ],
)
def test_an_environment_that_is_incomplete_is_one_line(environment, message):
    with pytest.raises(UserError, match=message):
        detect_process(environment)


@pytest.mark.parametrize(
    "nodes, host",
    [("a", "a"), ("a1,b2", "a1"), ("n[001-4]", "n001"), ("n[3,7-9],x", "n3"), ("r1n[05-09]-ib", "r1n05-ib")],
)
def test_first_host_of_a_slurm_list(nodes, host):
    assert first_host(nodes) == host


def test_one_process_starts_nothing():
    assert initialize(None, 1) is None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def together(places: list[ProcessInfo], timeout: float) -> list[str]:
    """The error of `rendezvous` for each of these places, all at once; "" where there is none."""

    def one(place):
        try:
            rendezvous(place, timeout)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places))


def test_processes_meet_and_a_missing_one_is_named():
    place = lambda port, index: ProcessInfo("flags", f"127.0.0.1:{port}", 3, index)
    port = free_port()
    assert together([place(port, index) for index in (2, 0, 1)], 20) == [""] * 3
    port = free_port()
    for said in together([place(port, index) for index in (0, 2)], 1):
        assert "after 1 s process 1 of 3 had not come" in said and "--join_timeout" in said
    [said] = together([place(free_port(), 1)], 0.5)
    assert "process 1 of 3 (flags) did not reach process 0" in said and "\n" not in said


def test_processes_that_were_started_differently_are_refused_at_once():
    port = free_port()
    counts = [ProcessInfo("flags", f"127.0.0.1:{port}", count, index) for index, count in ((0, 3), (2, 4))]
    begun = time.monotonic()
    for said in together(counts, 60):
        assert "process 2 was started as one of 4 processes, process 0 as one of 3" in said
    port = free_port()
    twice = [ProcessInfo("flags", f"127.0.0.1:{port}", 3, index) for index in (0, 1, 1)]
    for said in together(twice, 60):
        assert "two processes were started as process 1 of 3" in said
    assert time.monotonic() - begun < 50, "no process waits for those that cannot come"


def test_a_peer_that_was_restarted_while_the_others_gather_is_welcome():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        lead = pool.submit(rendezvous, ProcessInfo("flags", f"127.0.0.1:{port}", 3, 0), 20)
        while True:
            try:
                first = socket.create_connection(("127.0.0.1", port), timeout=1)
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
        with first:
            first.sendall(b"1 3\n")
        peers = [pool.submit(rendezvous, ProcessInfo("flags", f"127.0.0.1:{port}", 3, index), 20) for index in (1, 2)]
        assert [future.result() for future in (lead, *peers)] == [None] * 3


def test_a_missing_peer_ends_the_command_with_one_line():
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--process_id=0", "--join_timeout=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "v4jax", "train", *flags], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stderr.startswith("v4jax: after 1 s process 1 of 2 had not come")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "processes, text, lost",
    [
        (2, "INTERNAL: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:4711", True),
        (2, "RESOURCE_EXHAUSTED: out of memory", False),
        (1, "UNAVAILABLE: connection lost", False),
    ],
)
def test_a_lost_peer_ends_the_process_with_the_status_on_which_launchers_retry(
    monkeypatch, capsys, processes, text, lost
):
    class Exited(Exception):
        pass

    def exit_(status):
        raise Exited(status)

    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(os, "_exit", exit_)
    with pytest.raises((Exited, jax.errors.JaxRuntimeError)) as raised, peer_errors():
        raise jax.errors.JaxRuntimeError(text)
    assert (type(raised.value) is Exited) == lost
    if lost:
        assert raised.value.args == (75,)
        assert "start all of them again, they go on from the newest checkpoint" in capsys.readouterr().err
