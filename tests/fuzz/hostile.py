"""Hostile files against everything that reads them: `python -m tests.fuzz.hostile --count=20000 --seed=0`.

A case is one file of a good tree made hostile (`mutate`) and read (`seeds.KINDS`), in a worker process. It passes if it
is read, or refused by a UserError of one printable line. It fails if anything else is raised, if the worker dies, if it
takes more than `--seconds` of processor time (or twelve times as much of wall clock, for what waits), or if its peak
memory is more than 1 GiB above what the worker had before. A case is repeated with `--case=N`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter

ROOT = pathlib.Path(__file__).resolve().parents[2]
_MEMORY = 1 << 30  # bytes above the worker's own
_BACKSTOP = 8 << 30  # bytes of address space above the worker's own, so that no case takes the machine down
_LIFE = 1000  # cases of one worker
_MOST = 1000 + 16  # characters of a message


def run_case(number: int, seed: int, good: pathlib.Path, scratch: pathlib.Path) -> dict:
    """Make one file hostile, read it, and say what came of it."""
    from tests.fuzz.mutate import mutate_path
    from tests.fuzz.seeds import KINDS
    from v4jax.core.errors import UserError

    rng = random.Random(f"{seed}/{number}")
    [kind] = rng.choices(KINDS, [kind.weight for kind in KINDS])
    place = scratch / kind.part
    shutil.copytree(good / kind.part, place, symlinks=True)
    place.chmod(0o700)
    files = [path for path in place.glob(kind.files) if path.is_file()]
    # Orbax draws names of data files anew each time: by size they come in the same order.
    file = rng.choice(sorted(files, key=lambda path: (str(path.parent), path.stat().st_size, path.name)))
    done = {"case": number, "what": f"{kind.part}: {mutate_path(rng, file)}", "result": "read"}
    before = _peak(reset=True)
    try:
        kind.reads(place)
    except UserError as error:
        text, done["result"] = str(error), "refused"
        if not text.isprintable() or len(text) > _MOST:
            done |= {"result": "failed", "error": f"message of {len(text)} characters: {text!r:.300}"}
        else:
            done["message"] = text
    except KeyboardInterrupt:
        raise
    except BaseException:  # panics of Rust, too
        done |= {"result": "failed", "error": traceback.format_exc()[-3000:]}
    grown = _peak() - before
    if grown > _MEMORY and done["result"] != "failed":
        done |= {"result": "failed", "error": f"took {grown / 2**30:.1f} GiB"}
    shutil.rmtree(scratch)
    return done | {"grown": grown}


def _peak(reset: bool = False) -> int:
    """Bytes of the most memory that this process had since the last reset."""
    if reset:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def work(seed: int, good: pathlib.Path) -> None:
    """A worker: a case for every number on stdin, a line of JSON about it on stdout."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what cases print is not an answer
    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with tempfile.TemporaryDirectory() as scratch:
        run_case(0, seed, good, pathlib.Path(scratch) / "warm")  # imports
        run_case(1, seed, good, pathlib.Path(scratch) / "warm")
        size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + _BACKSTOP, resource.RLIM_INFINITY))
        print(json.dumps("ready"), file=out)
        for line in sys.stdin:
            print(json.dumps(run_case(int(line), seed, good, pathlib.Path(scratch) / line.strip())), file=out)


class Worker:
    """A worker process, watched."""

    def __init__(self, seed: int, good: pathlib.Path, seconds: float):
        self._arguments, self._seconds = (seed, good), seconds
        self._process, self._cases = None, 0

    def run(self, number: int) -> dict:
        """One case in it."""
        if self._process is None or self._cases >= _LIFE:
            self.close()
            seed, good = self._arguments
            command = [sys.executable, "-m", "tests.fuzz.hostile", "--work", f"--seed={seed}", f"--good={good}"]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", "RUST_BACKTRACE": "0", "PYTHONPATH": str(ROOT)}
            self._process, self._cases = (
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    cwd=ROOT,
                    env=environment,
                    start_new_session=True,
                ),
                0,
            )
            if not self._process.stdout.readline():
                raise RuntimeError("a worker cannot start; run it with --case=0")
        self._cases += 1
        print(number, file=self._process.stdin, flush=True)
        start, used = time.monotonic(), self._used()
        while not select.select([self._process.stdout], [], [], 0.05)[0]:
            if self._used() - used > self._seconds or time.monotonic() - start > 12 * self._seconds:
                self.close()
                return {"case": number, "result": "failed", "error": "hangs"}
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self.close()
            return {"case": number, "result": "failed", "error": f"the process died ({code})"}
        return json.loads(line) | {"seconds": self._used() - used}

    def _used(self) -> float:
        """Seconds of processor time, of all threads."""
        with contextlib.suppress(OSError):
            fields = pathlib.Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
            self._last = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return self._last

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


def fuzz(count: int, seed: int, seconds: float = 5.0, first: int = 0, tell: bool = False) -> list[dict]:
    """What came of cases first..first+count-1."""
    with tempfile.TemporaryDirectory() as directory:
        good = pathlib.Path(directory)
        subprocess.run(
            [sys.executable, "-m", "tests.fuzz.hostile", "--make", f"--good={good}"],
            check=True,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        )
        worker, done = Worker(seed, good, seconds), []
        try:
            for number in range(first, first + count):
                done.append(worker.run(number))
                if tell and done[-1]["result"] == "failed":
                    print(f"case {number}: {done[-1].get('what')}\n{done[-1]['error']}\n", flush=True)
                if tell and len(done) % 500 == 0:
                    print(f"{len(done)} cases: {dict(Counter(one['result'] for one in done))}", flush=True)
        finally:
            worker.close()
        return done


def main() -> int:
    """Exit status 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--case", type=int, help="run one case in this process and show its error")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--good", type=pathlib.Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.seed, given.good)
    elif given.make:
        from tests.fuzz.seeds import make

        make(given.good)
    elif given.case is not None:
        from tests.fuzz.seeds import make

        with tempfile.TemporaryDirectory() as directory:
            good = pathlib.Path(directory, "good")
            make(good)
            for key, value in run_case(given.case, given.seed, good, good.with_name("scratch")).items():
                print(f"{key}: {value}")
    else:
        done = fuzz(given.count, given.seed, given.seconds, given.first, tell=True)
        slowest = max(done, key=lambda one: one.get("seconds", 0))
        largest = max(done, key=lambda one: one.get("grown", 0))
        print(f"{len(done)} cases: {dict(Counter(one['result'] for one in done))}")
        print(
            f"most processor time {slowest.get('seconds', 0):.2f} s (case {slowest['case']}), "
            f"most memory {largest.get('grown', 0) / 2**20:.0f} MiB (case {largest['case']})"
        )
        return int(any(one["result"] == "failed" for one in done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
