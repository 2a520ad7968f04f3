"""Puts what the compiler said into the golden file: `python -m tests.golden plans PLAN.json...`.

The files are those of `v4jax plan ... --stage=buffers --json=PLAN.json` (`tests/tools/test_plan.py`). What the golden
file holds of the same plan is replaced. They take minutes each, and libtpu, so no test makes them.
"""

import json
import pathlib

PATH = pathlib.Path(__file__).with_name("compiled.json")
_METRICS = ("device_bytes", "host_bytes", "largest_temporary", "collective_bytes")
_PLAN = ("config", "topology", "mode", "context", "concurrency", "cache", "hot")


def plan_of(record: dict) -> tuple:
    """What a record is about."""
    return tuple(record.get(name) for name in _PLAN)


def main(files: list[str]) -> None:
    """Write the file anew."""
    new = [record for file in files for record in json.loads(pathlib.Path(file).read_text())]
    new = [record for record in new if record["source"] == "compiled" and record["metric"] in _METRICS]
    fresh = {plan_of(record) for record in new}
    records = [record for record in json.loads(PATH.read_text()) if plan_of(record) not in fresh] + new
    records.sort(key=lambda record: tuple(map(str, plan_of(record))))
    PATH.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
