"""Hostile forms of a file: of its JSON by structure, of its bytes, and of the file itself."""

from __future__ import annotations

import json
import os
import pathlib
import random

_RAW = "\x00raw:"  # begins a string that stands for JSON text as it is
DEEP = 200_000

NUMBERS = (
    0,
    -1,
    1,
    2,
    3,
    7,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63,
    2**64,
    10**9,
    10**12,
    10**18,
    10**300,
    -(2**63),
    0.0,
    -0.0,
    0.5,
    1e-300,
    1e300,
    -1e300,
    1e-45,
    1.0000001,
)
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "1" * 5000,
    "0" * 50,
    "9" * 4299,
    '"\\ud800"',
    '"\\udc00x"',
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    "[" * 70 + "]" * 70,
    "01",
    "+1",
    "'a'",
    "undefined",
    '{"a":1,"a":2}',
    "1e-400",
    "[1,]",
    '"\\x41"',
)
TEXTS = (
    "",
    " ",
    "a",
    "\x00",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202eevil",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "A" * 5000,
    "x" * 100_000,
    "é" * 300,
    "\n\n\n",
    "'" * 300,
    "%s%n{0}{x}",
    "NaN",
    "true",
    "None",
    "model.safetensors",
    "swa",
    "csa",
    "bfloat16",
    "float64",
    "\U0001f600" * 2000,
    "a/b",
    "\ufeff",
    "<0xZZ>",
)


def hostile_value(rng: random.Random, value):
    """Something in place of a JSON value, often of its own type."""
    kind = rng.random()
    if kind < 0.3 and isinstance(value, (int, float)) and not isinstance(value, bool):
        return rng.choice([*NUMBERS, value * 2, value + 1, value - 1, -value, value / 3, str(value), bool(value)])
    if kind < 0.3 and isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice([*TEXTS, value * 2, value.upper(), value[:at] + rng.choice(TEXTS) + value[at:], value[::-1]])
    if kind < 0.3 and isinstance(value, list) and value:
        item = rng.choice(value)
        many = [[item] * 1000, [item] * 10_000]
        return rng.choice([[], value * 2, value[:-1], value[::-1], [value], [*value, None], *many])
    if kind < 0.3 and isinstance(value, dict):
        return rng.choice([{}, [], list(value), list(value.items())[:50], {"type": "Sequence"}, dict.fromkeys(value)])
    if kind < 0.5:
        return rng.choice(NUMBERS)
    if kind < 0.7:
        return rng.choice(TEXTS)
    if kind < 0.85:
        return _RAW + rng.choice(RAW)
    return rng.choice([None, True, False, [], {}, [[]], [None], {"": None}, [1, "a", None], {"a": {"b": 1}}])


def mutate_json(rng: random.Random, value):
    """A copy of a JSON value with one to three hostile changes."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _mutate_once(rng, value)
    return value


def _mutate_once(rng: random.Random, value):
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.02:
        return hostile_value(rng, value)
    parent = value
    while True:  # down to a random place, so that small objects are met as often as large ones
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        child = parent[key]
        if not isinstance(child, (dict, list)) or not child or rng.random() < 0.3:
            break
        parent = child
    what = rng.random()
    if what < 0.72:
        parent[key] = hostile_value(rng, child)
    elif what < 0.82:
        del parent[key]
    elif isinstance(parent, list):
        parent.insert(key, hostile_value(rng, child))
    elif what < 0.9:
        parent[rng.choice(TEXTS)] = parent.pop(key)
    elif what < 0.95:
        parent[_RAW + json.dumps(key)] = child  # occurs twice in the text
    else:
        parent[rng.choice(["unknown", *TEXTS])] = hostile_value(rng, child)
    return value


def to_text(value) -> bytes:
    """JSON text in which raw pieces stand as they are."""
    text = json.dumps(value)
    marker = json.dumps(_RAW)[:-1]
    while (start := text.find(marker)) >= 0:
        raw, end = json.JSONDecoder().raw_decode(text[start:])
        text = text[:start] + raw.removeprefix(_RAW) + text[start + end :]
    return text.encode("utf-8", "surrogatepass")


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes with flips, cuts, insertions, repetitions, or something else altogether."""
    what = rng.randrange(9)
    at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    if what == 0:
        return data[:at]
    if what == 1:
        return data[:at] + data[end:]
    if what == 2:
        return data[:at] + rng.randbytes(rng.choice((1, 4, 8, 1000))) + data[at:]
    if what == 3:
        return data[:at] + data[at : at + 1000] * 20 + data[at:]
    if what == 4:
        return rng.choice(
            (
                b"",
                b"\x00" * 100,
                b"null",
                b"[]",
                b"{}",
                b"3",
                b'""',
                b"[" * DEEP,
                b'{"a":' * DEEP,
                b"[" * DEEP + b"]" * DEEP,
                b"\xff\xfe{\x00}\x00",
                b"\xef\xbb\xbf" + data,
                b" " * 3_000_000,
                b"[" + b"{}," * 1_500_000 + b"{}]",
                data * 2,
                data.replace(b":", b" "),
                b"\x1f\x8b" + data,
                b"[" + b"1e400," * 1000 + b"0]",
                b'"' + b"a" * 5_000_000 + b'"',
            )
        )
    out = bytearray(data or b"\x00")
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        place = rng.randrange(len(out))
        out[place] = out[place] ^ (1 << rng.randrange(8)) if what < 7 else rng.randrange(256)
    return bytes(out)


def mutate_file(rng: random.Random, path: pathlib.Path) -> str:
    """Put something else in place of a file; what it was."""
    path.unlink()
    what = rng.choice(("missing", "directory", "pipe", "loop", "dangling", "device", "sparse", "wide"))
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "dangling":
        path.symlink_to("nowhere")
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    elif what == "wide":
        path.write_bytes(b"{" + b",".join(b'"k%d":0' % i for i in range(300_000)) + b"}")
    return what


def mutate_path(rng: random.Random, path: pathlib.Path) -> str:
    """Make a file hostile in one of the three ways; what was done, in a few words."""
    data, what = path.read_bytes(), rng.random()
    if what < 0.04:
        return f"{path.name}: {mutate_file(rng, path)}"
    if path.suffix == ".safetensors":
        return f"{path.name}: {_mutate_safetensors(rng, path, data)}"
    try:
        value = None if what < 0.2 else json.loads(data)
    except ValueError:
        value = None
    if value is not None:
        path.write_bytes(to_text(mutate_json(rng, value)))
        return f"{path.name}: structure"
    if path.suffix == ".jsonl" and what > 0.2:
        lines = data.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = to_text(mutate_json(rng, json.loads(lines[at])))
        path.write_bytes(b"\n".join(lines) + b"\n")
        return f"{path.name}: a line's structure"
    path.write_bytes(mutate_bytes(rng, data))
    return f"{path.name}: bytes"


def _mutate_safetensors(rng: random.Random, path: pathlib.Path, data: bytes) -> str:
    length = int.from_bytes(data[:8], "little")
    header, rest, what = data[8 : 8 + length], data[8 + length :], rng.random()
    if what < 0.1:
        path.write_bytes(mutate_bytes(rng, data))
        return "bytes"
    if what < 0.2:
        stated = rng.choice((0, 1, 2**63, 2**64 - 1, length - 1, length + 1, len(data), 100_000_000))
        path.write_bytes(stated.to_bytes(8, "little") + header + rest)
        return "length"
    if what < 0.23:
        entry = b'"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        raw = b"{" + b",".join(entry % i for i in range(120_000)) + b"}"
    else:
        raw = mutate_bytes(rng, header) if what < 0.35 else to_text(mutate_json(rng, json.loads(header)))
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + rest)
    return "header"
