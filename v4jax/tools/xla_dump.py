"""Buffer assignment and optimized HLO of a program, read from XLA's dump before machine code is generated.

XLA dumps files to the directory of its option `xla_dump_to`, pass by pass. The dumped buffer assignment is final.
Generating machine code takes most of the compile time of a large program. A compile that only needs bytes and
collectives therefore runs in its own process, which is killed as soon as these files are complete.
"""

from __future__ import annotations

import multiprocessing
import pathlib
import re
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from v4jax.core.errors import UserError

_HOST, _DEVICE = "5", "0"  # XLA's colors of memory spaces: pinned host memory and the device's main memory
_FILES = ("-buffer-assignment.txt", ".txt")  # file names end in "after_optimizations" and these: buffer assignment, HLO
_SETTLED = 6  # a file counts as complete after this many polls, 0.5 s apart, without growth


@dataclass(frozen=True)
class Buffers:
    """Buffers of one device.

    Attributes:
      device_bytes: Bytes of "arguments" and "temporaries" in device memory. Temporaries include constants, and results
        that reuse no argument's buffer.
      host_bytes: The same in host memory.
      largest: Size in bytes and type of the largest array among the temporaries of both memories.
      text: The optimized program (HLO).
    """

    device_bytes: dict[str, int]
    host_bytes: dict[str, int]
    largest: tuple[int, str]
    text: str


def read(directory: str) -> Buffers:
    """Read the buffers of the program that XLA dumped to `directory`.

    Raises:
      UserError: The files of a program are missing.
    """
    files = _written(directory)
    if files is None:
        raise UserError(f"{directory} does not hold what a compiler writes of one program")
    assignment, text = (file.read_text() for file in files)
    sums = {space: {"arguments": 0, "temporaries": 0} for space in (_DEVICE, _HOST)}
    largest, temporary = (0, ""), False
    for line in assignment.splitlines():
        if match := re.match(r"allocation \d+: size (\d+),(?: page \d+,)?(?: color (\d+),)? ([\w-]+)", line):
            space, kind = match[2] or _DEVICE, match[3]
            temporary = kind == "preallocated-temp" and space in sums
            if space in sums and kind != "thread-local":  # thread-local: inside of fused operations
                sums[space]["arguments" if kind == "parameter" else "temporaries"] += int(match[1])
        elif temporary and (match := re.match(r" value: .*\(size=(\d+),offset=\d+\): (\S+)", line)):
            largest = max(largest, (int(match[1]), match[2]))
    return Buffers(sums[_DEVICE], sums[_HOST], largest, text)


def placed(compile: Callable, *arguments) -> tuple[Buffers, float]:
    """Run `compile(directory, *arguments)` in a new process until XLA has assigned the buffers.

    Args:
      compile: Function at module level that makes XLA dump to `directory`.
      *arguments: Arguments that can be pickled.

    Returns:
      The buffers, and the CPU seconds of the process.

    Raises:
      UserError: `compile` raised it, or the process ended, before the buffers were assigned.
    """
    context, begun = multiprocessing.get_context("spawn"), _children_seconds()
    with tempfile.TemporaryDirectory(prefix="v4jax-plan-") as directory:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(sender, compile, directory, *arguments))
        process.start()
        sizes, looks = None, 0
        try:
            while process.is_alive():
                process.join(0.5)
                files = _written(directory)
                now = files and [file.stat().st_size for file in files]
                sizes, looks = now, looks + 1 if now is not None and now == sizes else 0
                if looks >= _SETTLED and files[1].read_text().endswith("}\n\n"):
                    break
        finally:
            process.kill()
            process.join()
        if _written(directory) is None:  # files that exist may exceed the device's memory
            early = f"the compile ended with status {process.exitcode} before it had placed its buffers"
            raise UserError(receiver.recv() if receiver.poll() else early)
        return read(directory), _children_seconds() - begun


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _run(sender, compile: Callable, directory: str, *arguments) -> None:
    try:
        compile(directory, *arguments)
    except UserError as error:
        sender.send(str(error))


def _written(directory: str) -> list[pathlib.Path] | None:
    """Return the files of the largest program in `directory`, or None if one is missing."""
    found = [sorted(pathlib.Path(directory).glob(f"*after_optimizations{end}"), key=_size) for end in _FILES]
    return [files[-1] for files in found] if all(found) else None


def _size(file: pathlib.Path) -> int:
    return file.stat().st_size
