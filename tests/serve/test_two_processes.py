"""An engine over several processes, each with tiers of its own: all keep the same state, whoever fetches."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests.serve import two_process_worker
from tests.serve.engine_harness import LIMITS, tokens_of
from v4jax import config
from v4jax.checkpoint import save
from v4jax.serve.engine import Engine

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

ROOT = pathlib.Path(__file__).resolve().parents[2]


def both(*arguments):
    """What each of two processes of two devices said."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"  # the last one counts
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": flags,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-m", "tests.serve.two_process_worker", *map(str, arguments)]
    children = [
        subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in (0, 1)
    ]
    try:
        said = [child.communicate(timeout=600)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], said
    return [json.loads(text.splitlines()[-1]) for text in said]


def test_what_processes_let_go_comes_back_and_stays_over_a_restart(model, plain, tmp_path):
    expected = tokens_of(plain, two_process_worker.prompts(), two_process_worker.GREEDY)
    save(model, tmp_path / "model")  # no process is to hold all of it
    [read, again], its = both(tmp_path / "model", tmp_path / "kv", "rr")
    assert [read, again] == its  # one process counts what the other's tiers gave
    assert read["answers"] == again["answers"] == expected
    assert [read["restored"], again["restored"]] == [0, 8]  # a block each: two conversations share a device

    mine, its = both(tmp_path / "model", tmp_path / "kv", "rha")
    assert all(said["answers"] == expected for said in mine + its)
    assert [said["restored"] for said in mine] == [said["restored"] for said in its]
    assert mine[0]["restored"] == 8  # each request went where its blocks are
    assert mine[1]["restored"] == 12  # one disk hangs: no request waits for it long, and what the other has comes back
    assert mine[2]["late"] == 0 < its[1]["late"]

    assert {path.name for path in (tmp_path / "kv").iterdir()} == {"0", "1"}
    cache = config.Cache(kv_disk_bytes=1 << 30, kv_dir=str(tmp_path / "kv" / "1"), kv_load_timeout_s=60.0)
    engine = Engine(model, LIMITS, cache)  # names of blocks are those of one device
    assert tokens_of(engine, two_process_worker.prompts(), two_process_worker.GREEDY) == expected
    assert engine.stats()["restored_blocks"] == 4
    engine.close(60.0)
