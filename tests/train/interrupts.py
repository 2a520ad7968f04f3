"""Stops real runs at random moments and resumes them: `python -m tests.train.interrupts --count=50 --signal=TERM`.

Each trial trains a micro model by the command line in a process of its own, sends it a signal at a random moment (from
before the first import until after the end; in two of three trials while it trains), checks its exit code and that what
it said is on disk, and lets a second process finish the run. Losses, held-out losses and the parameters at the end must
be those of an uninterrupted run, bit for bit.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

if __name__ == "__main__":
    import tests.conftest  # noqa: F401  the quick compiler and one cache of programs for all processes

from tests.train.conftest import WORDS, micro_config, one_layer
from v4jax.checkpoint.orbax import OrbaxTensors, finished_steps
from v4jax.config import Config
from v4jax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 60
_DEADLINE = 900  # seconds in which a process must end, on a machine that does much else
# `python -m v4jax`, but without torch, which tensorboardX would import for seconds where it is installed.
_PROGRAM = "import sys; sys.modules['torch'] = None; from v4jax.__main__ import run; run()"


def get_config(source: str = "") -> Config:
    """The config file of the runs: short steps, so that much of the time is spent in what comes between them."""
    train = dict(steps=STEPS, log_every=1, eval_every=4, checkpoint_every=5, lr=5e-3, adam_lr=5e-3)
    return one_layer(micro_config(source, **train))


def write_text(path: pathlib.Path) -> pathlib.Path:
    """The corpus of the runs."""
    path.write_text(
        "".join(f"Chapter {i}. {' '.join(WORDS[i % 7 :] + WORDS)}.\n" for i in range(200)), encoding="utf-8"
    )
    return path


def start(text: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    """The run in a process of its own."""
    flags = [f"--config={__file__}:{text}", f"--workdir={workdir}"]
    command = [sys.executable, "-X", "faulthandler", "-c", _PROGRAM, "train", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # A shell starts its background jobs with SIGINT ignored, and the runs would inherit that.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed
    )


def ended(process: subprocess.Popen) -> str:
    """Its output. Raises AssertionError with the stacks of all its threads if it hangs."""
    try:
        return process.communicate(timeout=_DEADLINE)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # at which faulthandler writes them
        raise AssertionError(f"no end after {_DEADLINE} s\n{process.communicate()[0]}") from None


def result(workdir: pathlib.Path) -> tuple:
    """All losses and held-out losses of a finished run, and a digest of its parameters."""
    records = read_metrics(workdir / "metrics.jsonl")
    curves = [[(r["step"], r[name]) for r in records if name in r] for name in ("loss", "heldout_loss")]
    config = get_config()
    tensors, digest = OrbaxTensors(workdir, config.model), hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors.read(name).tobytes())
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    return curves, digest.hexdigest(), summary["heldout_loss"], finished_steps(workdir)[-1]


def moment(rng: random.Random, seconds: float, workdir: pathlib.Path, process: subprocess.Popen) -> str:
    """Wait for a random moment of a run that takes about `seconds`; returns its description."""
    if rng.random() < 1 / 3:
        after = rng.uniform(0, 1.1 * seconds)
        time.sleep(after)
        return f"after {after:.2f} of {seconds:.2f} s"
    records, more = rng.randrange(STEPS), rng.uniform(0, 0.1)
    metrics, end = workdir / "metrics.jsonl", time.monotonic() + _DEADLINE
    while process.poll() is None and time.monotonic() < end:
        if metrics.exists() and metrics.read_bytes().count(b"\n") > records:
            break
        time.sleep(0.002)
    time.sleep(more)
    return f"{1e3 * more:.0f} ms after record {records}"


def check(code: int, output: str, workdir: pathlib.Path, signum: signal.Signals, finished: bool) -> str:
    """What the process did that got the signal, `finished` or not by then.

    Raises AssertionError if it ended otherwise than it should, or said what is not.
    """
    steps = finished_steps(workdir)
    if code == 0:
        assert finished, f"the signal was ignored\n{output}"
        return "finished before the signal"
    if code == -signum:  # before the handler was there, or after it was taken away
        assert "saved" not in output or steps, output
        return "ended by the system: too early for a handler, or too late"
    assert code == 128 + signum, f"exit code {code}\n{output}"
    assert "Traceback" not in output, output
    said = re.search(r"stopped; the checkpoint of step (\d+) is saved", output)
    if said is None:
        assert not steps or "going on" not in output, output
        return "stopped before the first step"
    assert steps and int(said[1]) == steps[-1], f"said {said[1]}, found {steps}\n{output}"
    reached = max((r["step"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r), default=0)
    assert reached == steps[-1], f"step {reached} was reached, the checkpoint is {steps[-1]}\n{output}"
    return "stopped and saved"


def trials(
    count: int, signals: list[signal.Signals], directory: pathlib.Path, seed: int = 0
) -> collections.Counter[str]:
    """How often each thing happened in `count` trials, which send the signals in turn.

    Raises AssertionError at the first that fails.
    """
    rng, text, seen = random.Random(seed), write_text(directory / "story.txt"), collections.Counter()
    for name in ("first", "whole"):  # the first fills the cache of programs
        begun = time.monotonic()
        process = start(text, directory / name)
        output = ended(process)
        assert process.returncode == 0, output
        seconds = time.monotonic() - begun
    wanted = result(directory / "whole")
    assert result(directory / "first") == wanted
    for trial, signum in zip(range(count), itertools.cycle(signals), strict=False):
        workdir = directory / f"cut{trial}"
        process = start(text, workdir)
        when = moment(rng, seconds, workdir, process)
        finished = (workdir / "summary.json").exists()
        process.send_signal(signum)
        output = ended(process)
        what = check(process.returncode, output, workdir, signum, finished)
        process = start(text, workdir)
        output = ended(process)
        assert process.returncode == 0, f"{when}: {what}, then\n{output}"
        assert result(workdir) == wanted, f"{when}: {what}, then another result"
        seen[what] += 1
        print(f"{trial + 1}/{count} {signum.name} {when}: {what}; resumed to the bit", file=sys.stderr, flush=True)
    return seen


def main() -> int:
    """Run the trials in a temporary directory and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--signal", choices=("TERM", "INT"), default="TERM")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        seen = trials(args.count, [signal.Signals[f"SIG{args.signal}"]], pathlib.Path(directory), args.seed)
    print(f"SIG{args.signal}: {seen.total()} of {args.count} runs were resumed to the bit")
    for what, number in seen.most_common():
        print(f"  {number:3d}  {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
