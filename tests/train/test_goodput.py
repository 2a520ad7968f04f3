"""Goodput: arithmetic on a clock of our own, and a run that was stopped and went on."""

import pytest

from v4jax.train.goodput import Goodput


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_only_steps_that_were_kept_count():
    clock, records = Clock(), [{"step": 0, "started": 1000.0}]
    clock.now += 30  # starting and compiling
    goodput = Goodput(records, clock)
    clock.now += 20
    assert goodput.steps(4) == 5
    assert goodput.share() == pytest.approx(20 / 50)
    clock.now += 10  # saving
    goodput.start_timer()
    clock.now += 20
    assert goodput.steps(4) == 5 and goodput.share() == pytest.approx(40 / 80)
    # Killed here. The last four steps were not saved: their records are dropped, and done again after a minute.
    records += [{"step": step, "loss": 1.0, "seconds": 5.0} for step in (1, 2, 3, 4)] + [{"step": 4, "started": 1140.0}]
    clock.now = 1150.0
    again = Goodput(records, clock)
    again.start_timer()
    clock.now += 20
    assert again.steps(4) == 5 and again.share() == pytest.approx(40 / 170)
