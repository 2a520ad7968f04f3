"""What the compiler wrote of a program when it had placed all buffers, before it made machine code of them.

XLA writes files to the directory that its option `xla_dump_to` names, pass by pass. The buffer assignment among them is
final. Machine code is most of a large program's compile, so a compile that is of interest for its bytes and collectives
alone runs in a process of its own, which is ended as soon as these files are there.
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

_HOST, _DEVICE = "5", "0"  # colours of memory spaces: pinned host memory, and what the device has most of
_FILES = ("-buffer-assignment.txt", ".txt")  # after "after_optimizations": where everything lies, and the program
_SETTLED = 6  # looks, half a second apart, that find not a byte more: then a file is taken to be whole


@dataclass(frozen=True)
class Buffers:
    """Of one device: bytes of arguments and of temporaries on it (with constants and with results that take no
    argument's place), the same in host memory, the largest array among the temporaries of both (bytes, type), and the
    optimized program as text."""

    device_bytes: dict[str, int]
    host_bytes: dict[str, int]
    largest: tuple[int, str]
    text: str


def read(directory: str) -> Buffers:
    """The buffers of the one program that was written to `directory`. Raises UserError if it is not there."""
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
            if space in sums and kind != "thread-local":  # those stand for the inside of fused operations
                sums[space]["arguments" if kind == "parameter" else "temporaries"] += int(match[1])
        elif temporary and (match := re.match(r" value: .*\(size=(\d+),offset=\d+\): (\S+)", line)):
            largest = max(largest, (int(match[1]), match[2]))
    return Buffers(sums[_DEVICE], sums[_HOST], largest, text)


def placed(compile: Callable, *arguments) -> tuple[Buffers, float]:
    """Run `compile(directory, *arguments)` in a fresh process until the buffers are placed; them, and its CPU seconds.

    `compile` is a function of a module, its arguments can be pickled, and it has the compiler write to `directory`.
    A UserError that it raises before is raised here.
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
        if _written(directory) is None:  # else they were placed, if perhaps in more memory than there is
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
    """The files of the largest program in `directory`, if they are all there."""
    found = [sorted(pathlib.Path(directory).glob(f"*after_optimizations{end}"), key=_size) for end in _FILES]
    return [files[-1] for files in found] if all(found) else None


def _size(file: pathlib.Path) -> int:
    return file.stat().st_size
