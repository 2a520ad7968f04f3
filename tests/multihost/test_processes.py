"""Several processes on loopback train and generate as one does; one that is killed ends the others, and the restart
goes on."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.train.conftest import WORDS
from v4jax.checkpoint.orbax import finished_steps
from v4jax.train.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

ROOT = pathlib.Path(__file__).parents[2]
NOTICED = 90  # seconds in which a run must end after one of its processes was killed

# Lines that differ between runs: timings, and Gloo's messages, which may be cut in two where two threads write at once.
OWN_LINES = re.compile(r"Gloo|peer ranks|TTFT")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    lines = [f"Chapter {i}. {' '.join(WORDS[i % 7 :] + WORDS)}.\n" for i in range(200)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def command(text, workdir, *flags) -> list[str]:
    return ["train", f"--config={ROOT}/tests/multihost/micro_config.py:{text}", f"--workdir={workdir}", *flags]


def launch(processes: int, devices: int, arguments: list[str]) -> subprocess.Popen:
    local = [sys.executable, str(ROOT / "launch/local.py"), f"-n={processes}", f"--devices={devices}", "--", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # with the quick compiler of conftest.py
    return subprocess.Popen(local, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen) -> str:
    try:
        output = process.communicate(timeout=900)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # which the launcher passes on
        raise
    assert process.returncode == 0, output
    return output


def wait_for_records(process: subprocess.Popen, workdir: pathlib.Path, count: int) -> None:
    metrics, end = workdir / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and len(read_metrics(metrics)) >= count):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.02)


def losses(workdir: pathlib.Path) -> list[float]:
    records = read_metrics(workdir / "metrics.jsonl")
    rows = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert list(rows) == list(range(1, 21))
    return list(rows.values())


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The run of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    finished(launch(1, 8, command(text, workdir, "--config.mesh.rules=fsdp", "--config.mesh.data=2")))
    return workdir


def test_a_killed_run_of_two_processes_goes_on_as_four_on_another_mesh(text, whole, tmp_path):
    """2 x 4 devices with experts split over all; one process is killed; then 4 x 2 with `fsdp` give the same losses."""
    workdir = tmp_path / "cut"
    process = launch(2, 4, command(text, workdir, "--config.mesh.rules=expert"))
    wait_for_records(process, workdir, 9)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGKILL)
    killed = time.monotonic()
    output = process.communicate(timeout=300)[0]
    assert process.returncode not in (0, None) and time.monotonic() - killed < NOTICED
    assert "process 1 ended with signal 9" in output, output
    # A collective that breaks, or, where none does in half a minute, JAX's heartbeats.
    assert re.search("v4jax: another process of this run|JAX distributed service .* another task died", output), output
    assert not (workdir / "summary.json").exists()
    finished(launch(4, 2, command(text, workdir, "--config.mesh.rules=fsdp")))
    np.testing.assert_allclose(losses(workdir), losses(whole), rtol=2e-5)


def test_ctrl_c_saves_a_run_of_two_processes(text, tmp_path):
    """The launcher passes the signal on to both; they agree on a step, save it, and end with the code of Ctrl-C."""
    workdir = tmp_path / "run"
    endless = ["--config.mesh.rules=fsdp", "--config.train.steps=100000", "--config.train.checkpoint_every=100000"]
    process = launch(2, 1, command(text, workdir, *endless))
    wait_for_records(process, workdir, 4)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 130 and "Traceback" not in output, output
    [step] = finished_steps(workdir)
    assert f"the checkpoint of step {step} is saved" in output
    assert step == max(record["step"] for record in read_metrics(workdir / "metrics.jsonl"))


def train_workers(text, workdir, how: str) -> list[tuple[int, str]]:
    """Return exit codes and outputs of two processes that call `train` from Python (train_worker.py)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    processes = []
    for index in range(2):
        arguments = [str(index), str(port), str(text), str(workdir), how]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.multihost.train_worker", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_sigterm_stops_processes_that_call_train_from_python(text, tmp_path):
    """JAX's handler is installed before `train` is called, and only it makes all processes stop after the same step."""
    ended = train_workers(text, tmp_path / "run", "stops")
    assert [code for code, _ in ended] == [143, 143], ended
    [step] = finished_steps(tmp_path / "run")
    assert f"the checkpoint of step {step} is saved" in ended[0][1]


def test_a_disk_that_is_full_for_one_process_is_one_line_in_all(text, tmp_path):
    ended = train_workers(text, tmp_path / "run", "full")
    for code, output in ended:
        assert code == 1 and "Traceback" not in output, output
        assert "No space left on device; free some space or choose another disk, the earlier" in output
    assert finished_steps(tmp_path / "run") == [5]


def test_a_time_limit_gives_all_processes_the_same_number_of_steps(text, tmp_path):
    flags = ["--config.mesh.rules=fsdp", "--config.train.steps=30", "--config.train.max_seconds=1"]
    output = finished(launch(2, 1, command(text, tmp_path / "run", *flags)))
    assert "the run makes 15 of 30 steps" in output
    assert finished_steps(tmp_path / "run")[-1] == 15


def test_two_processes_generate_on_one_mesh_what_one_device_does(whole):
    """2 x 2 devices, a request for each; the first process alone speaks."""
    prompts = [f"--prompt={' '.join(WORDS[i:])}" for i in range(4)]
    said = []
    for processes, devices, mesh in ((1, 1, []), (2, 2, ["--mesh=serve"])):
        options = [*mesh, "--max_tokens=12", "--max_num_seqs=1", "--max_model_len=256", "--temperature=0"]
        said.append(finished(launch(processes, devices, ["generate", f"--checkpoint={whole}", *prompts, *options])))
    said = [[line for line in output.splitlines() if not OWN_LINES.search(line)] for output in said]
    assert said[0] == said[1] and len(said[0]) >= 8
