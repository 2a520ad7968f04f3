"""Loss spikes: what counts as one, and what a skipped or rolled-back run has left of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.conftest import SgdTrainer, one_layer, sharing, with_train
from v4jax.checkpoint.orbax import TrainCheckpointer, finished_steps
from v4jax.config import Train, validate
from v4jax.core.errors import UserError
from v4jax.data.pipeline import make_dataset
from v4jax.data.tokenizer import Tokenizer
from v4jax.train import loop
from v4jax.train.metrics import read_metrics
from v4jax.train.spike_guard import check_step, new_guard

pytestmark = pytest.mark.slow

STEP = jax.jit(check_step, static_argnums=3)


def judged(values, factor=8.0, window=8):
    """What the guard said to each (loss, gradient norm), and what it remembers."""
    guard, said = new_guard(Train(spike_action="skip", spike_window=window)), []
    for loss, norm in values:
        good, guard = STEP(guard, jnp.float32(loss), jnp.float32(norm), factor)
        said.append(bool(good))
    return said, guard


def reference(values, factor, window):
    """The rule in words of numpy, in float64."""
    taken, said = [], []
    for pair in np.maximum(values, 1e-6):
        last = np.log(taken[-window:]) if len(taken) >= window else None
        good = bool(np.isfinite(pair).all())
        if good and last is not None:
            middle = np.median(last, axis=0)
            spread = np.maximum(1.4826 * np.median(np.abs(last - middle), axis=0), 0.02)
            good = bool((np.log(pair) <= middle + factor * spread).all())
        said.append(good)
        taken += [pair] if good else []
    return said


def test_the_guard_follows_its_rule():
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(0, 0.3, (60, 2))) * [4.0, 1.0]
    values[[20, 33], [0, 1]] *= 300
    values[[40, 41], [1, 0]] = np.nan, np.inf
    said, guard = judged(values, 4.0)
    assert said == reference(values, 4.0, 8) and not (said[20] or said[33] or said[40] or said[41])
    assert int(guard.skipped) == said.count(False)
    assert int(guard.num_steps) == said.count(True)
    assert int(guard.consecutive_skips) == 0


def test_falling_losses_and_slow_growth_are_no_spikes_and_factor_zero_takes_every_number():
    fall = [(10 * 0.8**i, 1.1**i) for i in range(30)]
    assert all(judged(fall)[0])
    said, guard = judged([(1.0, 1.0)] * 9 + [(1e30, 1.0), (np.nan, 1.0), (1.0, -np.inf), (1.0, np.inf)], 0.0)
    assert said == [True] * 10 + [False, True, False] and int(guard.consecutive_skips) == 1


@pytest.fixture
def small(config):
    """One layer, for what is compiled here is not what is tested."""
    return with_train(one_layer(config), spike_action="skip", spike_factor=0.0, spike_patience=2, steps=7, log_every=1)


class Poisoned(SgdTrainer):
    """A trainer whose loss is infinite at the batches, counted from 1, whose numbers are in `bad`."""

    bad: tuple[int, ...] = ()

    def __init__(self, config):
        super().__init__(config)
        self.placed = 0

    def model_loss(self, params, fixed, batch):
        return self._spoil(*super().model_loss(params, fixed, batch), batch)

    def shard_batch(self, batch):
        self.placed += 1
        return super().shard_batch(batch | {"positions_BT": batch["positions_BT"] + 4000 * (self.placed in self.bad)})

    @staticmethod
    def _spoil(total, parts, batch):
        factor = jnp.where(batch["positions_BT"].max() >= 4000, jnp.inf, 1.0)
        return total * factor, parts | {"loss": parts["loss"] * factor}


class BadGradient(Poisoned):
    """The loss stays finite, its gradient does not."""

    @staticmethod
    def _spoil(total, parts, batch):
        return total * jnp.where(batch["positions_BT"].max() >= 4000, jnp.inf, 1.0), parts


class BadUpdate(Poisoned):
    """Loss and gradient norm stay finite, the update overflows."""

    before = optax.stateless(lambda grads, _: jax.tree.map(lambda x: jnp.where(jnp.abs(x) > 1e8, jnp.inf, x), grads))

    @staticmethod
    def _spoil(total, parts, batch):
        return total * jnp.where(batch["positions_BT"].max() >= 4000, 1e12, 1.0), parts


SHARED = {kind: sharing(kind) for kind in (Poisoned, BadGradient, BadUpdate)}


@pytest.fixture
def run(small, tmp_path, monkeypatch):
    """Trains with these batches spoilt, and returns the records of the run and what it raised."""
    monkeypatch.setattr("v4jax.train.summary.baselines", lambda corpus: {"xz": 2.0, "xz_kind": "alone", "trigram": 3.0})
    monkeypatch.setattr(loop, "Trainer", SHARED[Poisoned])

    def train(bad, **changes):
        monkeypatch.setattr(Poisoned, "bad", bad)
        try:
            raised = loop.train(with_train(small, **changes), str(tmp_path / "run")) and None
        except UserError as error:
            raised = str(error)
        return read_metrics(tmp_path / "run" / "metrics.jsonl"), raised

    return train


def test_a_skipped_step_changes_nothing(small, monkeypatch):
    monkeypatch.setattr(Poisoned, "bad", (2,))
    trainer = Poisoned(small)
    ids = np.random.default_rng(0).integers(3, 2048, (2, 34)).astype(np.int32)
    batch = {
        "tokens_BT": ids[:, :32],
        "targets_BT": ids[:, 1:33],
        "targets2_BT": ids[:, 2:],
        "segments_BT": np.ones((2, 32), np.int32),
        "positions_BT": np.tile(np.arange(32, dtype=np.int32), (2, 1)),
    }
    state, _ = trainer.step(trainer.init(), trainer.shard_batch(batch))
    before = jax.device_get(state)
    state, metrics = trainer.step(state, trainer.shard_batch(batch))
    after = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, after[:3], before[:3])  # parameters, biases, optimizer
    assert not np.isfinite(metrics["loss"])
    assert after.step == 2
    assert after.guard.consecutive_skips == after.guard.skipped == 1
    after = jax.device_get(trainer.step(state, trainer.shard_batch(batch))[0])
    assert after.guard.consecutive_skips == 0 and (after.params["head.weight"] != before.params["head.weight"]).any()


def test_a_rollback_goes_on_with_the_data_after_it(run):
    """Batches 5 and 6 are bad: after checkpoint 3, two in a row are too many, so steps 4 to 7 use batches 7 to 10."""
    records, raised = run((5, 6), spike_action="rollback")
    assert raised is None and [r["rolled_back_from"] for r in records if "rolled_back_from" in r] == [6]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 8))
    assert all(r.get("skipped", 0) == 0 for r in records)


def test_too_many_skipped_steps_end_the_run_with_one_line(run, capfd):
    records, raised = run((2, 4, 5))
    assert "2 steps in a row were skipped until step 5" in raised
    assert "step 2 skipped: loss inf" in capfd.readouterr().err
    by_step = {r["step"]: r for r in records if "skipped" in r}
    assert by_step[3]["skipped"] == 1 and "loss" not in by_step[2] and by_step[5]["skipped_row"] == 2


def test_a_run_that_goes_back_again_and_again_gives_up(run):
    records, raised = run(tuple(range(5, 40)), spike_action="rollback")
    assert "3 times the run went back to step 3 and spiked again" in raised


@pytest.mark.parametrize(
    "trainer, message",
    [
        (BadGradient, "and the gradient norm (nan|inf) at step 6"),
        (BadUpdate, "the update of step 6 left values"),
    ],
)
def test_a_checkpoint_is_finite_or_is_not_finished(run, tmp_path, monkeypatch, trainer, message):
    monkeypatch.setattr(loop, "Trainer", SHARED[trainer])
    monkeypatch.setattr(trainer, "bad", (6,))
    _, raised = run((), spike_action="off")
    assert re.match(f".*{message}.*the last good checkpoint is step 3$", raised)
    assert finished_steps(tmp_path / "run") == [3]
    monkeypatch.setattr(trainer, "bad", ())
    records, raised = run((), spike_action="off")
    assert raised is None and finished_steps(tmp_path / "run")[-1] == 7
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 8))


def test_before_the_first_checkpoint_none_is_called_good(run, tmp_path):
    _, raised = run((3,), spike_action="off")
    assert raised.endswith("there is no checkpoint yet") and finished_steps(tmp_path / "run") == []


def test_an_update_that_overflows_is_rolled_back(run, monkeypatch):
    monkeypatch.setattr(loop, "Trainer", SHARED[BadUpdate])
    monkeypatch.setattr(BadUpdate, "bad", (6,))
    records, raised = run((), spike_action="rollback")
    assert raised is None and [r["rolled_back_from"] for r in records if "rolled_back_from" in r] == [6]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 8))


def test_a_checkpoint_that_is_not_finite_is_not_resumed(run, small, tmp_path):
    trainer = Poisoned(small)
    state = trainer.init()
    params = state.params | {"norm.scale": state.params["norm.scale"] * jnp.nan}
    with TrainCheckpointer(tmp_path / "run", small, keep=2) as store:
        extras = {"data": iter(make_dataset(small, Tokenizer(), "train", seed=0)).get_state(), "heldout": {}}
        store.save(3, trainer.to_tree(state), extras)
        store.save(6, trainer.to_tree(state._replace(params=params)), extras)
    with pytest.raises(UserError, match="step 6 .* not finite; remove .*run/checkpoints/6 to go on from the one"):
        loop.train(small, str(tmp_path / "run"))


@pytest.mark.parametrize(
    "train, complaint",
    [
        ({"spike_action": "jump"}, "train.spike_action is 'jump'; one of off, skip, rollback"),
        ({"spike_window": 0}, "train.spike_window must be at least 1"),
        ({"spike_factor": -1.0}, "train.spike_factor must be at least 0"),
        ({"hang_timeout_s": -2.0}, "train.hang_timeout_s must be at least 0"),
    ],
)
def test_what_the_guard_and_the_watchdog_cannot_do_is_said(config, train, complaint):
    with pytest.raises(UserError, match=complaint):
        validate(with_train(config, **train))


def test_the_state_is_stored_under_the_names_of_earlier_checkpoints(small):
    trainer = SgdTrainer(small)
    tree = trainer.to_tree(trainer.init())
    assert set(tree["guard"]) == {"recent_2W", "taken", "row", "skipped"}
    changed = tree | {"guard": tree["guard"] | {"taken": jnp.int32(7), "row": jnp.int32(2)}}
    guard = trainer.from_tree(changed).guard
    assert (int(guard.num_steps), int(guard.consecutive_skips), int(guard.skipped)) == (7, 2, 0)
