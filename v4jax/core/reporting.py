"""Tables on the terminal and JSON records in files, in one form for all commands that measure."""

from __future__ import annotations

import json

from v4jax.core.atomic import replace_file
from v4jax.core.paths import local_path


def write_json(path: str, records: list[dict]) -> None:
    """Write records (flat dicts) to a JSON file atomically."""
    replace_file(local_path(path, "json"), (json.dumps(records, indent=1) + "\n").encode())


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table with padded columns, readable on the terminal and ready to paste into documents."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    line = lambda cells: (
        "| " + " | ".join(str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
    )
    print(f"\n{title}\n")
    print(line(header))
    print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    for row in rows:
        print(line(row))
    print(flush=True)
