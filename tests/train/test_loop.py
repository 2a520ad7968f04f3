"""Whole runs: they learn, resume bit for bit, survive kills, and say what is wrong."""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import optax
import pytest

import v4jax
from tests.train.conftest import SHARED_SGD, SgdTrainer, one_layer, with_train
from v4jax import cli
from v4jax.checkpoint.orbax import finished_steps, newest_extras
from v4jax.core.errors import UserError
from v4jax.data.tokenizer import Tokenizer
from v4jax.train import loop
from v4jax.train.metrics import read_metrics
from v4jax.train.stop_signals import StopSignals
from v4jax.train.trainer import Trainer
from v4jax.train.workdir_lock import LOCK_NAME

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
    monkeypatch.setattr("v4jax.train.summary.baselines", lambda corpus: marks)


def test_a_run_learns_and_leaves_everything(config, tmp_path):
    summary = loop.train(with_train(config, steps=40, lr=0.02, adam_lr=0.03, eval_every=20), str(tmp_path / "run"))
    values = losses(tmp_path / "run")
    assert list(values) == list(range(1, 41)) and values[40] < values[1] - 2
    assert summary["heldout_bits_per_byte"] < 3 and json.loads((tmp_path / "run/summary.json").read_text()) == summary
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run/tensorboard").iterdir())
    heldout = [r["heldout_loss"] for r in read_metrics(tmp_path / "run/metrics.jsonl") if "heldout_loss" in r]
    assert len(heldout) == 2 and heldout[1] < heldout[0]


@pytest.fixture
def small(config, monkeypatch):
    """One layer and a simple optimizer, so that little is compiled."""
    monkeypatch.setattr(loop, "Trainer", SHARED_SGD)
    return one_layer(config)


def stopped(config, workdir, method: str, when) -> str:
    """Train and ask to stop when the run calls `method` of its store or itself for the `when`-th time."""
    stop = StopSignals()
    run = loop._Run(config, pathlib.Path(workdir), stop)
    owner = run.store if hasattr(run.store, method) else run
    original, calls = getattr(owner, method), []

    def asks(*args):
        calls.append(args)
        if len(calls) == when:
            stop.asked = signal.SIGTERM  # as the handler does while a step may be saved
        return original(*args)

    setattr(owner, method, asks)
    with pytest.raises(SystemExit) as stopped:
        run.run()
    assert stopped.value.code == 128 + signal.SIGTERM
    return loop._where_it_stands(str(workdir))


@pytest.mark.parametrize(
    "method, when, step",
    [("_flush_metrics", 1, 2), ("_measure", 1, 4), ("save", 1, 4), ("_evaluate", 2, 6), ("wait", 3, 6)],
    ids=["while metrics are fetched", "before an evaluation", "while saving", "in the last evaluation", "at the end"],
)
def test_a_stop_at_any_moment_is_saved_and_resumes_bit_for_bit(small, tmp_path, method, when, step):
    small = with_train(small, steps=6, checkpoint_every=3, log_every=2, eval_every=4)
    loop.train(small, str(tmp_path / "whole"))
    said = stopped(small, tmp_path / "cut", method, when)
    assert f"the checkpoint of step {step} is saved" in said
    assert finished_steps(tmp_path / "cut")[-1] == step
    loop.train(small, str(tmp_path / "cut"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    values = lambda name: [
        r["heldout_loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl") if "heldout_loss" in r
    ]
    assert values("cut") == values("whole")


def test_a_resume_reads_the_rows_that_follow_or_is_refused(small, tmp_path, monkeypatch):
    """Another batch size goes on at the next row; another seed is refused, and nothing written, until it is allowed."""
    read, dataset = [], loop.make_dataset

    def spied(config, tokenizer, split, **options):
        data = dataset(config, tokenizer, split, **options)
        if split != "train":
            return data
        rows_from = lambda row: map(lambda batch: read.append(batch["tokens_BT"]) or batch, data.dataset_from(row))
        return dataclasses.replace(data, dataset_from=rows_from)

    monkeypatch.setattr(loop, "make_dataset", spied)
    order = lambda config: iter(dataset(config, Tokenizer(), "train", seed=config.train.seed))
    rows = lambda batches: np.concatenate([batch["tokens_BT"] for batch in batches])
    loop.train(with_train(small, steps=3, batch_size=2), str(tmp_path))
    larger = with_train(small, steps=5, batch_size=4)
    loop.train(larger, str(tmp_path))
    whole = rows(next(batch) for batch in [order(with_train(small, batch_size=2))] * 7)
    assert [len(batch) for batch in read] == [2, 2, 2, 4, 4] and np.array_equal(np.concatenate(read), whole)

    other = with_train(larger, seed=5, steps=6)
    before = (tmp_path / "v4jax.json").read_text()
    with pytest.raises(UserError, match="changed: train.seed 0 -> 5"):
        loop.train(other, str(tmp_path))
    assert (tmp_path / "v4jax.json").read_text() == before and len(read) == 5
    allowed = dataclasses.replace(other, data=dataclasses.replace(other.data, on_change="restart"))
    loop.train(allowed, str(tmp_path))
    assert np.array_equal(read[-1], next(order(other))["tokens_BT"])
    former = newest_extras(tmp_path)["data"]["former"]
    assert [(data["rows"], data["seed"]) for data in former] == [(14, 0)]


def test_a_stop_that_jax_turned_into_an_error_is_still_a_stop(small, tmp_path, capsys):
    stop = StopSignals()

    def interrupted(self):
        stop.asked = signal.SIGINT
        raise ValueError("Exception raised while checking equality of metadata fields") from KeyboardInterrupt()

    small_trainer = type("Interrupted", (SgdTrainer,), {"init": interrupted})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "Trainer", small_trainer)
        loop.train(small, str(tmp_path / "run"), stop)
    assert "stopped before the first checkpoint" in capsys.readouterr().out


CHILD = textwrap.dedent("""
    import pickle, sys, time
    from v4jax.train import loop, summary
    place = loop.Trainer.shard_batch
    loop.Trainer.shard_batch = lambda *a: time.sleep(0.02) or place(*a)  # so that no signal comes after the end
    summary.baselines = lambda corpus: {"xz": 2.0, "xz_kind": "alone", "trigram": 3.0}
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
    config = with_train(one_layer(config), steps=120, checkpoint_every=10, log_every=1)
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
            assert process.returncode == 128 + signal.SIGTERM and "is saved in" in output
    process = child(config, tmp_path, workdir)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert losses(workdir) == losses(tmp_path / "whole") and len(losses(workdir)) == 120


def test_training_compiles_its_step_once(config):
    trainer = Trainer(one_layer(config))
    state, rng = trainer.init(), np.random.default_rng(0)
    for _ in range(3):
        ids = rng.integers(3, 2048, (2, 34)).astype(np.int32)
        batch = {
            "tokens_BT": ids[:, :32],
            "targets_BT": ids[:, 1:33],
            "targets2_BT": ids[:, 2:],
            "segments_BT": np.ones((2, 32), np.int32),
            "positions_BT": np.tile(np.arange(32, dtype=np.int32), (2, 1)),
        }
        state, _ = trainer.step(state, jax.device_put(batch))
    assert trainer.step._cache_size() == 1


def test_a_loss_that_is_no_number_ends_the_run_with_one_line(config, tmp_path):
    wild = with_train(one_layer(config), adam_lr=1e30, lr=1e30, clip_norm=1e30, warmup=0, steps=4)
    with pytest.raises(UserError, match="lower train.lr"):
        loop.train(wild, str(tmp_path / "run"))


class LargeTrainer(SgdTrainer):
    """After the first update the parameters are finite and the loss is not."""

    before = optax.scale(1e25)


@pytest.mark.parametrize("when, saved, cure", [
    ({"eval_every": 1}, [], "there is no checkpoint yet"),
    ({"steps": 1}, [1], "remove .*/checkpoints/1 to go on from the one before"),
])  # fmt: skip
def test_a_heldout_loss_that_is_no_number_ends_the_run_with_one_line(small, tmp_path, monkeypatch, when, saved, cure):
    monkeypatch.setattr(loop, "Trainer", LargeTrainer)
    wild = with_train(small, **{"warmup": 0, "checkpoint_every": 1} | when)
    with pytest.raises(UserError, match=f"the held-out loss is nan at step 1: lower train.lr.*; {cure}"):
        loop.train(wild, str(tmp_path / "run"))
    assert finished_steps(tmp_path / "run") == saved and not (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("name", ["loss.png", ".summary.json.partial"])
def test_a_disk_that_is_full_at_the_end_is_one_line(small, tmp_path, name):
    """The checkpoint is there, and the next run writes what is missing. Writes to /dev/full fail with ENOSPC."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / name).symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write .*No space left on device; free some space .* are good"):
        loop.train(small, str(workdir))
    assert finished_steps(workdir)[-1] == 6 and not (workdir / "summary.json").exists()
    assert not [thread for thread in threading.enumerate() if "tensorboardX" in type(thread).__module__]
    (workdir / name).unlink(missing_ok=True)
    assert loop.train(small, str(workdir))["steps"] == 6


def test_the_printed_evaluation_works_as_it_is(small, tmp_path, capsys):
    """The run reads files; their path is in its checkpoint, and `eval` reads no path that a checkpoint stores."""
    summary = loop.train(with_train(small, eval_rows=4), str(tmp_path / "a run"))
    line = next(line for line in capsys.readouterr().out.splitlines() if "v4jax eval" in line)
    argv = shlex.split(line)[1:]
    assert argv[0] == "eval" and cli.main([*argv, f"--json={tmp_path / 'eval.json'}"]) == 0
    [loss] = [r["value"] for r in json.loads((tmp_path / "eval.json").read_text()) if r["metric"] == "loss"]
    assert loss == pytest.approx(summary["heldout_loss"], rel=1e-5)


def test_a_hostile_summary_is_made_again(small, tmp_path):
    summary = loop.train(small, str(tmp_path / "run"))
    path = tmp_path / "run/summary.json"
    for damage in (b"[" * 200_000, b'{"steps": 6, "steps": 6}', b"\xff", b'{"steps": 6, "heldout_loss": NaN}'):
        path.write_bytes(damage)
        assert loop.train(small, str(tmp_path / "run"))["heldout_loss"] == summary["heldout_loss"]
        assert json.loads(path.read_text())["steps"] == 6


def test_an_exported_model_is_no_run(small, tmp_path):
    loop.train(small, str(tmp_path / "run"))
    v4jax.save(v4jax.load(tmp_path / "run"), tmp_path / "exported", format="orbax")
    with pytest.raises(UserError, match="exported holds an exported model.*train in another workdir"):
        loop.train(small, str(tmp_path / "exported"))


def test_a_finished_run_stays_and_another_model_in_its_workdir_is_refused(small, tmp_path, capsys):
    first = loop.train(small, str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert f"held-out loss  {first['heldout_loss']:.4f} nats a token" in said
    assert f"v4jax generate --checkpoint={tmp_path / 'run'} --prompt=" in said and "loss.png" in said
    contents = lambda: {
        path.relative_to(tmp_path): path.read_bytes()
        for path in sorted(tmp_path.rglob("*"))
        if path.is_file() and path.name != LOCK_NAME
    }
    before = contents()
    assert loop.train(small, str(tmp_path / "run")) == first and contents() == before
    assert "the run is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="a checkpoint of step 6, and train.steps is 5"):
        loop.train(with_train(small, steps=5), str(tmp_path / "run"))
    other = dataclasses.replace(small, model=dataclasses.replace(small.model, num_attention_heads=4))
    with pytest.raises(UserError, match="model.num_attention_heads"):
        loop.train(other, str(tmp_path / "run"))
    assert contents() == before


def test_a_run_without_its_summary_makes_it_again_and_repeats_no_record(small, tmp_path):
    first = loop.train(small, str(tmp_path / "run"))
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    (tmp_path / "run/summary.json").write_text("{")
    again = loop.train(small, str(tmp_path / "run"))
    assert again | {"tokens_per_second": None} == first | {"tokens_per_second": None}
    assert read_metrics(tmp_path / "run/metrics.jsonl") == records
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/metrics.jsonl").unlink()
    assert loop.train(small, str(tmp_path / "run"))["heldout_loss"] == first["heldout_loss"]


def test_a_finished_run_goes_on_to_more_steps(small, tmp_path, capsys):
    loop.train(small, str(tmp_path / "run"))
    shown = ["loading the data", "initializing the parameters", "compiling", "measuring the held-out loss"]
    lines = [line.removeprefix("micro: ") for line in capsys.readouterr().err.splitlines()]
    assert [line for line in lines if line in shown] == shown
    longer, metrics = with_train(small, steps=8), tmp_path / "run/metrics.jsonl"
    metrics.unlink()
    metrics.mkdir()  # no state of the metrics stops a run
    assert loop.train(longer, str(tmp_path / "run"))["steps"] == 8
    err = capsys.readouterr().err
    assert "going on from step 6 of 8" in err and "micro: restoring the checkpoint" in err
    assert "metrics.jsonl: it cannot be read (it is no regular file); it is now metrics.jsonl.1" in err
    assert list(losses(tmp_path / "run")) == [7, 8]


def test_a_tokenizer_that_adds_no_bos_gets_one_in_the_run(small, tmp_path):
    """The run's rows begin with bos, so the tokenizer that the run keeps puts bos before a prompt."""
    packaged, source = Tokenizer(), tmp_path / "tokenizer"
    packaged.save(source)
    spec = json.loads((source / "tokenizer.json").read_text())
    spec["post_processor"] = None
    (source / "tokenizer.json").write_text(json.dumps(spec))
    assert Tokenizer(source).encode_document("") == []
    config = dataclasses.replace(small, data=dataclasses.replace(small.data, tokenizer=str(source)))
    with loop._Run(config, tmp_path / "run", StopSignals()).store:
        kept = Tokenizer(tmp_path / "run")
    assert kept.encode_document("the king") == [kept.bos_id, *packaged.encode("the king")]


def test_a_second_trainer_in_a_workdir_is_refused_at_once(small, tmp_path):
    workdir = tmp_path / "run"
    process = child(with_train(small, steps=10**6), tmp_path, workdir)
    try:
        wait_for(lambda: (workdir / "metrics.jsonl").exists(), process)
        before = sorted(workdir.iterdir())
        with pytest.raises(UserError, match=f"in use by another trainer .process {process.pid} on .*another --workdir"):
            loop.train(small, str(workdir))
        assert sorted(workdir.iterdir()) == before and process.poll() is None
    finally:
        process.kill()  # which leaves the file, and no lock
        process.communicate()
    assert (workdir / LOCK_NAME).exists()
    loop.train(small, str(workdir))


def test_damaged_metrics_never_stop_a_resume(small, tmp_path, capsys):
    whole = loop.train(with_train(small, steps=9), str(tmp_path / "whole"))
    workdir = tmp_path / "cut"
    stopped(with_train(small, steps=9), workdir, "save", 2)
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damage = [
        b"garbage\n",
        b"\0" * 100 + b"\n",
        b'{"step": 1, "loss": "\xff"}\n',
        b"[1]\n",
        b"7\n",
        b"{}\n",
        b'{"step": -1}\n',
        b'{"step": 1, "loss": NaN}\n',
        b'{"step": 1, "loss": null}\n',
        b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n",
        b"[" * 10**5 + b"\n",
        b"\n",
    ]
    path.write_bytes(b"".join([*damage[:6], *lines[:3], *damage[6:], *lines[3:], b'{"step": 6, "lo']))
    summary = loop.train(with_train(small, steps=9), str(workdir))
    assert summary["heldout_loss"] == whole["heldout_loss"] and losses(workdir) == losses(tmp_path / "whole")
    assert f"{len(damage) + 1} damaged lines are left out" in capsys.readouterr().err
    for line in path.read_text(encoding="utf-8").splitlines():
        assert isinstance(json.loads(line)["step"], int)
