"""A model and a corpus small enough to train in a test."""

import copy
import dataclasses

import jax
import numpy as np
import optax
import pytest

from tests.micro_model import micro
from v4jax.config import Config, Data, Train
from v4jax.train.trainer import Trainer

WORDS = "the king and his fool went over the hill to see the storm come in from the sea".split()


def micro_config(source: str, **train) -> Config:
    """Return a config that trains the micro model on the text file `source`; `train` are fields of `config.Train`."""
    defaults = dict(steps=6, batch_size=2, warmup=2, log_every=2, checkpoint_every=3, eval_rows=4)
    return Config("micro", micro(), Data(source=source, seq_len=32), Train(**defaults | train))


@pytest.fixture
def text_file(tmp_path):
    """A file of some 5,000 words in which every word follows from the ones before."""
    path = tmp_path / "story.txt"
    path.write_text(
        "".join(f"Chapter {i}. {' '.join(WORDS[i % 7 :] + WORDS)}.\n" for i in range(200)), encoding="utf-8"
    )
    return path


@pytest.fixture
def config(text_file):
    """The micro model on that text."""
    return micro_config(str(text_file))


def one_layer(config: Config) -> Config:
    """`config` with one layer of one kind: for tests of the loop, which is the same for every model."""
    model = dataclasses.replace(config.model, layer_types=("swa",), num_nextn_predict_layers=0)
    return dataclasses.replace(config, model=model)


class SgdTrainer(Trainer):
    """A trainer with momentum alone: Muon takes long to compile."""

    before = optax.identity()  # what is done to the gradients first

    def __init__(self, config: Config):
        super().__init__(config, optax.chain(self.before, optax.sgd(0.1, momentum=0.9)))


def sharing(kind: type[Trainer]):
    """Return a stand-in for the class `kind` whose trainers share compiled programs and initial states.

    A trainer that differs only in fields that no program depends on is a copy of an earlier one. Most tests of the loop
    start several runs of one shape, and compiling is most of their time.
    """
    trainers, states = {}, {}

    def make(config: Config) -> Trainer:
        unused = dict(max_seconds=0.0, log_every=1, eval_every=0, eval_rows=0, checkpoint_every=1, keep_checkpoints=1)
        data = dataclasses.replace(config.data, source="", on_change="refuse")
        key = dataclasses.replace(with_train(config, **unused), name="", data=data)
        if key not in trainers:
            trainers[key] = kind(config)
        trainer = copy.copy(trainers[key])
        trainer.config = config

        def init():
            if key not in states:
                states[key] = jax.device_get(trainers[key].init())
            return jax.device_put(jax.tree.map(np.copy, states[key]))  # a step donates its state

        trainer.init = init
        return trainer

    return make


def with_train(config: Config, **changes) -> Config:
    """`config` with other training fields."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


SHARED_SGD = sharing(SgdTrainer)
