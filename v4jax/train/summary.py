"""The end of a run: summary.json, the plot, and the last lines on the terminal."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping

from v4jax.config import SOURCES, Data
from v4jax.core import untrusted_json
from v4jax.core.atomic import replace_file
from v4jax.data.compression_baselines import baselines
from v4jax.data.sources import load_documents
from v4jax.train.metrics import MetricsWriter, plot_loss, read_metrics, write_errors

_NAME = "summary.json"


def baseline_marks(data: Data) -> dict[str, float | str]:
    """Return the bits per byte of simple compressors (xz, a byte trigram model) on the held-out text."""
    marks = baselines(load_documents(data))
    return {
        "xz_bits_per_byte": marks["xz"],
        "xz_kind": marks["xz_kind"],
        "trigram_bits_per_byte": marks["trigram"],
    }


def write_summary(writer: MetricsWriter, summary: dict, heldout_losses: dict[int, float]) -> dict[str, object]:
    """Write the last metrics record, the plot, and summary.json.

    summary.json is written last, so that its presence means that the run is finished.

    Args:
      writer: The run's metrics; closed here.
      summary: Name, steps, held-out loss and workdir ("checkpoint") of the run, and whatever else the file shall hold.
      heldout_losses: Held-out loss by step, for the plot.

    Returns:
      `summary` with the last training loss, the goodput and the path of the plot.

    Raises:
      UserError: A file cannot be written.
    """
    workdir, steps = pathlib.Path(summary["checkpoint"]), summary["steps"]
    measured = {name: value for name, value in summary.items() if name.startswith("heldout")}
    with write_errors(workdir):
        records = read_metrics(workdir / "metrics.jsonl")
        if not any(record["step"] == steps and measured.keys() <= record.keys() for record in records):
            writer.write(steps, measured)
        writer.close()
        last = {name: value for record in records for name, value in record.items()}
        goodput = last.get("goodput")
        if goodput is not None:
            print(f"goodput {goodput:.0%}: of the time since the run began, steps took this share", file=sys.stderr)
        plot = str(plot_loss(workdir, heldout_losses))
        summary = summary | {"train_loss": last.get("loss"), "goodput": goodput, "plot": plot}
        replace_file(workdir / _NAME, (json.dumps(summary, indent=2) + "\n").encode())
    return summary


def read_summary(workdir: pathlib.Path) -> bytes:
    """Return the content of summary.json, or b"" if it cannot be read or the plot is missing."""
    if (workdir / "loss.png").is_file():
        with contextlib.suppress(OSError, untrusted_json.JsonError):
            return untrusted_json.read_bytes(workdir / _NAME)
    return b""


def parse_summary(content: bytes, workdir: pathlib.Path) -> dict[str, object]:
    """Parse the content of summary.json, and point its paths to `workdir`, because a directory may have been moved.

    Raises:
      ValueError: `content` is no JSON.
      TypeError: It is no JSON object.
    """
    return untrusted_json.parse(content) | {"checkpoint": str(workdir), "plot": str(workdir / "loss.png")}


def closing_lines(summary: Mapping[str, object], data: Data) -> str:
    """Format the last lines of a finished run: the held-out loss, the paths of its files and commands to try next.

    Args:
      summary: Contents of summary.json. It has bits per byte only if the run was trained on text.
      data: The run's data. Its files become flags of `v4jax eval`, which reads no path that a checkpoint stores.
    """
    workdir = str(summary["checkpoint"])
    heldout = f"{summary['heldout_loss']:.4f} nats a token"
    checkpoint = f"--checkpoint={shlex.quote(workdir)}"
    commands = [f"v4jax eval {checkpoint} --suite=needle"]
    if "heldout_bits_per_byte" in summary:  # the run was trained on text
        marks = f"xz {summary['xz_bits_per_byte']:.3f}, byte trigram {summary['trigram_bits_per_byte']:.3f}"
        heldout += f", {summary['heldout_bits_per_byte']:.3f} bits per byte ({marks})"
        given = {"data": data.source if data.source not in SOURCES else "", "heldout": data.heldout}
        files = [f"--{name}={shlex.quote(path)}" for name, path in given.items() if path]
        commands = [
            f'v4jax generate {checkpoint} --prompt="Once upon a time"',
            " ".join(["v4jax eval", checkpoint, "--suite=perplexity", *files]),
        ]
    rows = {
        "held-out loss": heldout,
        "checkpoint": workdir,
        "plot": str(summary["plot"]),
        "summary": f"{workdir}/summary.json",
        "next": f"\n{'':<15}".join(commands),
    }
    return "\n".join(f"{name:<15}{value}" for name, value in rows.items())
