"""Prompts and answers of `v4jax generate`: read from flags, files and stdin, and streamed to the terminal."""

from __future__ import annotations

import collections
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator

from absl import flags

from v4jax.core.errors import UserError
from v4jax.core.spinner import spinner


def read_prompts(values: flags.FlagValues) -> list[str]:
    """Return the prompts of the command line, of files and of stdin, which is read at most once."""
    stdin = [*values.prompt, *values.prompt_file].count("-")
    if stdin > 1:
        raise UserError("stdin holds one prompt; give one of --prompt=- and --prompt_file=- once")
    typed = [_read("-", "--prompt=-") if text == "-" else decode_flag("prompt", text) for text in values.prompt]
    prompts = [*typed, *(_read(path, f"--prompt_file={path}") for path in values.prompt_file)]
    if not prompts:
        raise UserError('generate needs something to continue; add --prompt="..." or --prompt_file=FILE')
    return prompts


def _read(path: str, argument: str) -> str:
    """Read a prompt file, or stdin for "-", without its last line break. `argument` names it in error messages."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()
        return data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except OSError as error:
        raise UserError(f"cannot read {argument}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{argument} is not UTF-8 (byte {error.start}); convert it first") from error


def decode_flag(flag: str, text: str) -> str:
    """Decode the text of a flag as UTF-8, independent of the locale by which Python decoded the arguments."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeEncodeError:  # not from the command line, where every byte has a stand-in
        return text
    except UnicodeDecodeError as error:
        raise UserError(f"--{flag} is not UTF-8 (byte {error.start}); convert it first") from error


def token_ids(values: flags.FlagValues, name: str) -> list[int]:
    """Parse the token ids of a flag such as --eos_id=1,5."""
    if not all(text.strip().isdecimal() for text in values[name].value):
        raise UserError(f"--{name}={','.join(values[name].value):.60} is no list of token ids such as 1,5")
    return [int(text) for text in values[name].value]


def write_streams(pieces: Iterable[tuple[int, str]], prompts: list[str], show: bool = True) -> None:
    """Print the answers: the first one as it streams, the complete others after it.

    Until the first piece arrives, a spinner shows that programs are compiled and the prompts are prefilled.

    Args:
        pieces: (prompt index, text) of each piece.
        prompts: the prompts.
        show: False prints nothing; the pieces are consumed.
    """
    pieces = _after_first(iter(pieces), show)
    if not show:
        collections.deque(pieces, maxlen=0)
        return
    rest = [""] * len(prompts)
    if len(prompts) > 1:
        print(f"==> {prompts[0]}")
    for index, text in pieces:
        if index:
            rest[index] += text
        else:
            print(text, end="", flush=True)
    print()
    for prompt, text in list(zip(prompts, rest, strict=True))[1:]:
        print(f"\n==> {prompt}\n{text}")


def _after_first(pieces: Iterator[tuple[int, str]], show: bool) -> Iterator[tuple[int, str]]:
    """Yield the pieces, with a spinner until the first one arrives."""
    with spinner("compiling and prefilling", show):
        first = next(pieces, None)
    if first is not None:
        yield first
        yield from pieces
