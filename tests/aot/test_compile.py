"""The training step compiles for a TPU slice that is not there, and the closed form agrees with the compiler."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs libtpu (extra tpu)")
def test_tiny_compiles_for_four_chips_and_the_closed_form_agrees(tmp_path):
    file = tmp_path / "plan.json"
    command = [sys.executable, "-m", "v4jax", "plan", "--config=tiny", "--topology=v5e:2x2", f"--json={file}",
               "--config.train.scan=true", "--config.train.remat=true"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    records = json.loads(file.read_text())
    value = lambda source, metric, part: next(
        r["value"] for r in records if (r["source"], r["metric"], r.get("part")) == (source, metric, part)
    )
    state = value("analytic", "device_bytes", "weights") + value("analytic", "device_bytes", "optimizer")
    assert value("compiled", "device_bytes", "arguments") == pytest.approx(state, rel=0.1)
    assert 0.3 < value("compiled", "device_bytes", "temporaries") / value("analytic", "device_bytes", "activations") < 3
    kinds = {r["part"] for r in records if r["source"] == "compiled" and r["metric"] == "collective_bytes"}
    assert "ragged-all-to-all" in kinds
