"""Run a v4jax command as N processes on this machine, joined over the loopback interface.

    python launch/local.py -n 2 --devices=4 -- train --config=tiny --config.mesh.rules=fsdp --workdir=runs/two

For trying a multi-host run on one host, and for its tests: on CPUs every process gets `--devices` fake ones. Every line
of output begins with the number of its process. If one process fails, the others are stopped, and its exit code is the
launcher's; SIGTERM and Ctrl-C are passed on to all.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE = 60.0  # seconds that the others get to notice a dead peer by themselves, before they are killed


def main() -> int:
    """Start, wait, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", "--processes", type=int, required=True, help="how many")
    parser.add_argument("--devices", type=int, default=1, help="fake CPU devices of each process (default: 1)")
    parser.add_argument("--port", type=int, help="of the coordinator (default: a free one)")
    parser.add_argument("command", nargs="+", help="arguments of v4jax, after --")
    args = parser.parse_args()
    if args.processes < 1 or args.devices < 1:
        parser.error("-n and --devices must be at least 1")
    port = args.port or free_port()
    children = [start(args, port, index) for index in range(args.processes)]
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda signum, _: [child.send_signal(signum) for child in children])
    printers = [threading.Thread(target=copy, args=(index, child)) for index, child in enumerate(children)]
    for printer in printers:
        printer.start()
    code = wait(children)
    for printer in printers:
        printer.join()
    return code


def start(args: argparse.Namespace, port: int, index: int) -> subprocess.Popen:
    """One process, which gets its index from JAX's own variables."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}".strip()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(args.processes),
        "JAX_PROCESS_ID": str(index),
    }
    command = [sys.executable, "-m", "v4jax", *args.command]
    # In a session of their own, for a terminal's Ctrl-C would reach them twice: from the terminal and from here.
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait(children: list[subprocess.Popen]) -> int:
    """Exit code of the first process that fails, 0 if none does; the others follow within GRACE seconds."""
    first, deadline, running = 0, None, True
    while running:
        codes = [child.poll() for child in children]
        running = None in codes
        failed = sorted((code, index) for index, code in enumerate(codes) if code)  # what a signal ended comes first
        if failed and deadline is None:
            first, index = failed[0]
            deadline = time.monotonic() + GRACE
            how = f"exit code {first}" if first > 0 else f"signal {-first}"
            print(f"process {index} ended with {how}; the others have {GRACE:.0f} s to notice", flush=True)
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)
    return first if first >= 0 else 128 - first


def copy(index: int, child: subprocess.Popen) -> None:
    """Its output, line by line."""
    for line in child.stdout:
        print(f"[{index}] {line}", end="", flush=True)


def free_port() -> int:
    """A port on which no process listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
