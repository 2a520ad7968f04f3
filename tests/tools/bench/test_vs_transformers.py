"""The transformers suite: both arms on one small model, and its message without torch."""

import dataclasses
import importlib.util
import re

import pytest

from tests.micro_model import one_layer
from v4jax.config import Config, Data
from v4jax.core.errors import UserError
from v4jax.tools import bench
from v4jax.tools.bench import vs_transformers

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

MODEL = one_layer("csa", dtype="bfloat16")
CONFIG = Config(name="mine", model=MODEL, data=Data(seq_len=16))


@pytest.mark.skipif(
    not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")),
    reason="the other arm is transformers: install the extra `parity`",
)
def test_both_arms_run_the_same_model(monkeypatch, capfd):
    monkeypatch.setattr(vs_transformers, "PREFILL", (9, 16))
    monkeypatch.setattr(vs_transformers, "DECODED", 3)
    records = bench.run("vs_transformers", config=CONFIG, rounds=1)
    printed = capfd.readouterr().out
    difference = re.search("largest logit difference (.*) of the logit spread", printed)[1]
    assert 0 < float(difference) < 1e-4
    assert re.findall(r"^\| (\w+) +\| (\d+) ", printed, re.M) == [
        ("prefill", "9"),
        ("decode", "9"),
        ("prefill", "16"),
        ("decode", "16"),
        ("train", "16"),
    ]
    times = {(r["metric"], r["context"], r["arm"]): r["value"] for r in records if "arm" in r}
    assert len(times) == 15 and len(records) == 17 and all(value > 0 for value in times.values())
    assert all(r["suite"] == "vs_transformers" and r["rounds"] == 1 for r in records)
    for what, length in [("prefill", 9), ("decode", 16), ("train", 16)]:
        theirs, ours = (times[f"{what}_time", length, arm] for arm in ("transformers", "v4jax"))
        assert times[f"{what}_speedup", length, "transformers/v4jax"] == pytest.approx(theirs / ours)


def test_without_torch_it_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"needs torch and transformers \(no torch here\); install them beside v4jax"):
        bench.run("vs_transformers", config=dataclasses.replace(CONFIG, name="other"), rounds=1)
