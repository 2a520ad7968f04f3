"""Suite `train` names every way to train, and each is a config that trains."""

import dataclasses
import functools

import optax
import pytest

from tests.train.conftest import micro_config
from v4jax.config import MoE, validate
from v4jax.tools.bench import measure, train
from v4jax.train.trainer import Trainer

pytestmark = pytest.mark.slow


@pytest.fixture
def config():
    config = micro_config("unused", spike_action="rollback", remat=True)
    moe = MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, num_hash_layers=0)
    model = dataclasses.replace(config.model, layer_types=("swa",), num_nextn_predict_layers=0, moe=moe)
    return dataclasses.replace(config, model=model)


def test_ratios_are_to_the_plain_step_of_the_same_round(config, monkeypatch, capsys):
    """Two of the ways are really compiled; their times are made up."""
    ways = train.options(config)
    assert all(validate(way).train.remat == ("remat" in name) for name, way in ways.items())
    assert ways["mxfp4 experts"].train.expert_weight_format == "mxfp4" and ways["plain"].train.spike_action == "off"
    chosen = ("plain", "sharded, one device")
    monkeypatch.setattr(train, "Trainer", functools.partial(Trainer, optimizer=optax.sgd(0.1)))  # quick to compile
    monkeypatch.setattr(train, "options", lambda config: {name: ways[name] for name in chosen})
    seconds = iter([2.0, 3.0, 4.0, 4.0, 5.0, 10.0])
    monkeypatch.setattr(train, "timed", lambda work: work() and next(seconds))
    records = train._options(config, 3, {"config": "micro"})
    assert [(r["option"], r["metric"], r["value"], r["rounds"]) for r in records] == [
        ("plain", "step_ratio", 1.0, 3),
        ("sharded, one device", "step_ratio", 1.5, 3),
    ]
    assert "| sharded, one device | 4.000 s | 1.50" in capsys.readouterr().out
    assert measure.relative_iqr([1.5, 1.0, 2.0]) == pytest.approx(records[1]["spread"])
