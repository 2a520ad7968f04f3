"""Whole runs: they learn, resume bit for bit, survive kills, and say what is wrong."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

from tests.train.conftest import with_train
from v4jax.core.check import UserError
from v4jax.train import loop
from v4jax.train.metrics import read_metrics
from v4jax.train.state import Trainer

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


def losses(workdir) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(pathlib.Path(workdir) / "metrics.jsonl") if "loss" in r}


@pytest.fixture(scope="module")
def marks():
    """The baselines of the micro corpus take seconds that these tests need not spend."""
    return {"xz": 2.0, "xz_kind": "alone", "trigram": 3.0}


@pytest.fixture(autouse=True)
def quick_baselines(monkeypatch, marks):
    monkeypatch.setattr(loop, "baselines", lambda corpus: marks)


def test_a_run_learns_and_leaves_everything(config, tmp_path):
    summary = loop.train(with_train(config, steps=40, lr=0.02, adam_lr=0.03, eval_every=20), str(tmp_path / "run"))
    values = losses(tmp_path / "run")
    assert list(values) == list(range(1, 41)) and values[40] < values[1] - 2
    assert summary["heldout_bits_per_byte"] < 3 and json.loads((tmp_path / "run/summary.json").read_text()) == summary
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run/tensorboard").iterdir())
    heldout = [r["heldout_loss"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "heldout_loss" in r]
    assert len(heldout) == 2 and heldout[1] < heldout[0]


def test_resume_repeats_the_losses_bit_for_bit(config, tmp_path):
    loop.train(config, str(tmp_path / "whole"))
    whole = losses(tmp_path / "whole")
    stop = with_train(config, steps=6)
    run = loop._Run(stop, tmp_path / "cut")
    save = run.store.save

    def save_and_stop(step, tree, extras):
        save(step, tree, extras)
        run.stopping = True

    run.store.save = save_and_stop
    with pytest.raises(SystemExit) as stopped:
        run.run()
    assert stopped.value.code == 128 + signal.SIGTERM and max(losses(tmp_path / "cut")) == 3
    loop.train(config, str(tmp_path / "cut"))
    assert losses(tmp_path / "cut") == whole


CHILD = textwrap.dedent("""
    import pickle, sys, time
    from v4jax.train import loop
    place = loop.Trainer.place
    loop.Trainer.place = lambda *a: time.sleep(0.02) or place(*a)  # so that no signal comes after the end
    loop.baselines = lambda corpus: {"xz": 2.0, "xz_kind": "alone", "trigram": 3.0}
    loop.train(pickle.load(open(sys.argv[1], "rb")), sys.argv[2])
""")


def child(config, tmp_path, workdir) -> subprocess.Popen:
    """The run in a process of its own."""
    import pickle

    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(tmp_path / "config.pickle"), str(workdir)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.mark.multiprocess
def test_sigkill_and_sigterm_lose_nothing_that_was_saved(config, tmp_path):
    """One process runs through; another is killed twice at arbitrary moments, once asked to stop, and then finishes."""
    config = with_train(config, steps=120, checkpoint_every=10, log_every=1)
    whole = child(config, tmp_path, tmp_path / "whole")
    assert whole.wait(300) == 0, whole.communicate()[0]
    workdir = tmp_path / "cut"
    metrics = workdir / "metrics.jsonl"
    reached = lambda step: lambda: metrics.exists() and len(read_metrics(metrics)) >= step
    for step, signum in ((17, signal.SIGKILL), (43, signal.SIGKILL), (61, signal.SIGTERM)):
        process = child(config, tmp_path, workdir)
        wait_for(reached(step), process)
        process.send_signal(signum)
        output = process.communicate(timeout=120)[0]
        if signum == signal.SIGTERM:
            assert process.returncode == 128 + signal.SIGTERM and "the checkpoint is saved" in output
    process = child(config, tmp_path, workdir)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert losses(workdir) == losses(tmp_path / "whole") and len(losses(workdir)) == 120


def test_training_compiles_its_step_once(config):
    trainer = Trainer(config)
    state, rng = trainer.init(), np.random.default_rng(0)
    for _ in range(3):
        ids = rng.integers(3, 2048, (2, 34)).astype(np.int32)
        batch = {
            "tokens_BT": ids[:, :32], "targets_BT": ids[:, 1:33], "targets2_BT": ids[:, 2:],
            "segments_BT": np.ones((2, 32), np.int32), "positions_BT": np.tile(np.arange(32, dtype=np.int32), (2, 1)),
        }  # fmt: skip
        state, _ = trainer.step(state, jax.device_put(batch))
    assert trainer.step._cache_size() == 1


def test_a_loss_that_is_no_number_ends_the_run_with_one_line(config, tmp_path):
    with pytest.raises(UserError, match="lower train.lr"):
        loop.train(with_train(config, adam_lr=1e30, lr=1e30, clip_norm=1e30, warmup=0, steps=4), str(tmp_path / "run"))


def test_a_finished_run_stays_and_another_model_in_its_workdir_is_refused(config, tmp_path):
    first = loop.train(config, str(tmp_path / "run"))
    again = loop.train(config, str(tmp_path / "run"))  # a finished run only writes its summary anew
    assert again | {"tokens_per_second": None} == first | {"tokens_per_second": None}
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, heads=4))
    with pytest.raises(UserError, match="model.heads"):
        loop.train(other, str(tmp_path / "run"))
