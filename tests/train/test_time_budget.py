"""`train.max_seconds`: the steps that fit, by arithmetic, and a run that is shortened is the shorter run."""

import pytest

from tests.train.conftest import SHARED_SGD, one_layer, with_train
from tests.train.test_loop import losses, stopped
from v4jax.checkpoint.directory import read_config
from v4jax.checkpoint.orbax import newest_extras
from v4jax.config import ConfigError, Train, validate
from v4jax.train import loop, time_budget
from v4jax.train.time_budget import fit_steps


def fit(**changes):
    """Steps of the quickstart on a slow machine, or with other measurements."""
    measured = {"step_seconds": 1.4, "compile_seconds": 20.0, "elapsed": 60.0, "heldout_batches": 77}
    train = Train(steps=260, max_seconds=changes.pop("max_seconds", 300.0))
    return fit_steps(train, 10, **measured | changes)


def test_a_fast_machine_makes_all_steps_and_a_slow_one_those_that_fit():
    assert fit(step_seconds=0.7, elapsed=70.0) == 260
    steps = fit()
    assert 130 < steps < 260
    end = 1.4 * (0.25 * 77 + 8) + 0.25 * 20.0
    total = 60.0 + 20.0 + (steps - 10) * 1.4 + end
    assert 300.0 - 1.4 < total <= 300.0


def test_half_of_the_steps_are_made_in_any_case():
    assert fit(step_seconds=5.0) == fit(elapsed=1e6) == 130
    assert fit_steps(Train(steps=12, max_seconds=1.0), 10, 1.0, 1.0, 1.0, 1) == 10


def test_no_limit_is_no_limit():
    assert fit(step_seconds=1e3, max_seconds=0.0) == 260
    with pytest.raises(ConfigError, match="train.max_seconds must be at least 0"):
        validate(with_train(read_default(), max_seconds=-1.0))


def read_default():
    from v4jax.config import load

    return load("tiny")


def test_a_shortened_run_is_the_shorter_run_and_resumes_as_it(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("v4jax.train.summary.baselines", lambda corpus: {"xz": 2.0, "xz_kind": "alone", "trigram": 3.0})
    monkeypatch.setattr(time_budget, "MEASURED", 2)
    limited = with_train(config, steps=8, warmup=3, max_seconds=1e-3)
    summary = loop.train(limited, str(tmp_path / "limited"))
    assert summary["steps"] == 4 and read_config(tmp_path / "limited").train.steps == 4
    assert "the run makes 4 of 8 steps, to end within 0 s" in capsys.readouterr().err
    loop.train(with_train(config, steps=4, warmup=3), str(tmp_path / "shorter"))
    assert losses(tmp_path / "limited") == losses(tmp_path / "shorter")
    assert loop.train(limited, str(tmp_path / "limited")) == summary


@pytest.fixture
def small(config, monkeypatch):
    """One layer, a simple optimizer, and no baselines."""
    monkeypatch.setattr(loop, "Trainer", SHARED_SGD)
    monkeypatch.setattr("v4jax.train.summary.baselines", lambda corpus: {"xz": 2.0, "xz_kind": "alone", "trigram": 3.0})
    return one_layer(config)


def test_a_run_that_was_stopped_before_it_was_measured_is_measured_when_it_resumes(small, tmp_path, capsys):
    limited = with_train(small, steps=30, warmup=20, checkpoint_every=2, max_seconds=1e-3)
    assert "the checkpoint of step 3 is saved" in stopped(limited, tmp_path / "run", "save", 1)
    assert loop.train(limited, str(tmp_path / "run"))["steps"] == 15
    assert "the run makes 15 of 30 steps" in capsys.readouterr().err


def test_more_steps_are_made_when_more_are_asked_for(small, tmp_path):
    """A decision holds for one `train.steps` and `train.max_seconds`; others are measured again."""
    roomy = with_train(small, steps=4, max_seconds=1e6)
    assert loop.train(roomy, str(tmp_path / "run"))["steps"] == 4
    assert loop.train(with_train(roomy, steps=14), str(tmp_path / "run"))["steps"] == 14
    assert newest_extras(tmp_path / "run")["time_budget"] == {"requested_steps": 14, "max_seconds": 1e6, "steps": 14}
    assert loop.train(with_train(roomy, steps=40, max_seconds=1e-3), str(tmp_path / "run"))["steps"] == 24
    assert loop.train(with_train(roomy, steps=40, max_seconds=1e-3), str(tmp_path / "run"))["steps"] == 24
