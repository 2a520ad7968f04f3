"""Records, their curves, and what TensorBoard receives."""

import os
import struct

import numpy as np
import pytest

from tests.train.conftest import SgdTrainer, one_layer, with_train
from v4jax.core.errors import UserError
from v4jax.train import loop
from v4jax.train.metrics import MetricsWriter, plot_loss, read_metrics, smooth
from v4jax.train.optim import schedule


def test_the_smoothed_curve_is_unbiased():
    np.testing.assert_allclose(smooth([3.0] * 50), 3.0, rtol=1e-12)  # from its first point on
    line = np.linspace(8.0, 2.0, 2001)
    np.testing.assert_allclose(smooth(line)[1000], line[1000], rtol=1e-9)  # no lag behind a falling loss
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=60), 0.95 ** np.abs(np.arange(60)[:, None] - np.arange(60))
    np.testing.assert_allclose(smooth(values), weights @ values / weights.sum(1), rtol=1e-12)
    assert smooth([]).shape == (0,)


def scalars(workdir) -> set[tuple[str, int]]:
    """(tag, step) of every scalar in the event files."""
    from tensorboardX.proto import event_pb2

    found = set()
    for path in (workdir / "tensorboard").iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            found |= {(value.tag, event.step) for value in event.summary.value}
            at += size + 16
    return found


def test_rates_and_speed_are_recorded_and_junk_is_not(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Trainer", SgdTrainer)
    monkeypatch.setattr("v4jax.train.summary.baselines", lambda corpus: {"xz": 2.0, "xz_kind": "alone", "trigram": 3.0})
    config = with_train(one_layer(config), lr=0.02, adam_lr=0.01, spike_action="skip")
    loop.train(config, str(tmp_path))
    steps = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    for name in ("lr", "adam_lr"):
        wanted = [float(schedule(config.train, getattr(config.train, name))(step)) for step in range(6)]
        np.testing.assert_allclose([record[name] for record in steps], wanted, rtol=1e-6)
    assert max(record["lr"] for record in steps) == pytest.approx(0.02)
    for record in steps:
        assert record["tokens_per_second"] == pytest.approx(2 * 32 / record["seconds"])
    tags = {tag for tag, _ in scalars(tmp_path)}
    assert {"loss", "lr", "adam_lr", "tokens_per_second", "heldout_loss"} <= tags
    assert not {"started", "rolled_back_from"} & tags


def test_what_is_not_finite_is_left_out(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": float("nan"), "grad_norm": 2.0})
    writer.write(2, {"rolled_back_from": 7.0, "heldout_loss": float("inf")})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "grad_norm": 2.0},
        {"step": 2, "rolled_back_from": 7.0},
    ]
    assert scalars(tmp_path) == {("grad_norm", 1)}


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda path: path.write_bytes(b"") or os.truncate(path, (1 << 30) + 1), "1,073,741,825 bytes"),
        (lambda path: path.mkdir(), "no regular file"),
        (os.mkfifo, "no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "no regular file"),
        (lambda path: path.symlink_to("missing"), "No such file"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
    ],
    ids=["too large", "directory", "pipe", "device", "dangling link", "link to itself"],
)
def test_metrics_that_cannot_be_read_are_renamed_and_begin_anew(tmp_path, make, why):
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "metrics.jsonl.1").write_text("of an earlier time")
    make(path)
    before = path.lstat()
    writer = MetricsWriter(tmp_path, 3)
    assert why in writer.notice and "it is now metrics.jsonl.2, and the records begin anew" in writer.notice
    writer.write(4, {"loss": 1.0})
    writer.close()
    assert read_metrics(path) == [{"step": 4, "loss": 1.0}]
    assert (tmp_path / "metrics.jsonl.2").lstat().st_ino == before.st_ino
    assert MetricsWriter(tmp_path, 4).notice == "" and not (tmp_path / "missing").exists()


def test_the_plot_draws_what_the_metrics_hold(tmp_path, monkeypatch):
    """Loss, both learning rates and tokens/s by step, as the axes hold them."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    writer = MetricsWriter(tmp_path, 0)
    rows = [{"loss": 5.0 - i, "lr": 0.1 * i, "adam_lr": 0.2 * i, "tokens_per_second": 100.0 + i} for i in (1, 2, 3)]
    for step, row in enumerate(rows, 1):
        writer.write(step, row)
    writer.write(3, {"heldout_loss": 2.5})
    writer.close()
    plot_loss(tmp_path, {3: 2.5})
    [figure] = drawn
    loss, rate, speed = figure.axes
    data = lambda axes: {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert data(loss)["training"] == [4.0, 3.0, 2.0] and data(loss)["held out"] == [2.5]
    assert data(rate) == {
        "matrices (Muon)": [row["lr"] for row in rows],
        "the rest (AdamW)": [row["adam_lr"] for row in rows],
    }
    [line] = speed.lines
    assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == [101.0, 102.0, 103.0]
    assert "learning rate" in rate.get_ylabel() and "tokens/s" in speed.get_ylabel()


def test_a_disk_that_fills_up_is_one_line(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 1.0})
    writer._file.close()
    writer._file = open("/dev/full", "a", encoding="utf-8")  # every write fails with ENOSPC
    with pytest.raises(UserError, match="cannot write .*metrics.jsonl: No space left on device; free some .* are good"):
        writer.write(2, {"loss": 1.0})
        writer.flush()
    with pytest.raises(UserError, match="No space left on device"):
        writer.close()
    assert not writer._events.all_writers, "the thread that writes events has ended"
