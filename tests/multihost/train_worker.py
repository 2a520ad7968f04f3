"""A process of a run of two that calls `train` from Python.

Usage: `python -m tests.multihost.train_worker INDEX PORT TEXT WORKDIR HOW`.

HOW is "stops" (process 1 gets SIGTERM while it trains) or "full" (the disk of process 1 is full when step 10 is saved).
"""

import dataclasses
import errno
import os
import pathlib
import signal
import sys
import threading
import time

import optax

from tests.multihost import micro_config
from v4jax.checkpoint import orbax
from v4jax.core.errors import UserError
from v4jax.parallel.distributed import ProcessInfo, initialize
from v4jax.train import loop
from v4jax.train.trainer import Trainer


class SgdTrainer(Trainer):
    """Trains with SGD, because Muon takes long to compile."""

    def __init__(self, config):
        super().__init__(config, optax.sgd(0.1))


def stop_soon(workdir: pathlib.Path) -> None:
    """Send this process SIGTERM once a few steps are recorded."""
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 4):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def fill_disk() -> None:
    """Make the second save of this process find no free space."""
    require, calls = orbax.require_space, []

    def require_space(path, needed):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        require(path, needed)

    orbax.require_space = require_space


def main(index: int, port: int, text: str, workdir: pathlib.Path, how: str) -> int:
    """Train as process `index` of two."""
    initialize(ProcessInfo("test", f"127.0.0.1:{port}", 2, index), 120)
    loop.Trainer = SgdTrainer
    config = micro_config.get_config(text)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, rules="fsdp"))
    every = 100_000 if how == "stops" else config.train.checkpoint_every
    train = dataclasses.replace(config.train, steps=100_000, checkpoint_every=every)  # one program for both
    config = dataclasses.replace(config, train=train)
    if index and how == "stops":
        threading.Thread(target=stop_soon, args=[workdir], daemon=True).start()
    elif index:
        fill_disk()
    try:
        loop.train(config, workdir)
    except UserError as error:
        print(f"v4jax: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4]), sys.argv[5]))
