"""A model and a corpus small enough to train in a test."""

import dataclasses

import optax
import pytest

from v4jax.config import Config, Data, Indexer, Model, MoE, Train
from v4jax.train.trainer import Trainer

WORDS = "the king and his fool went over the hill to see the storm come in from the sea".split()


def micro_config(source: str, **train) -> Config:
    """Every feature on, in a model that compiles in seconds."""
    model = Model(
        vocab_size=2048,
        hidden_size=32,
        layer_types=("swa", "csa", "hca"),
        num_attention_heads=2,
        head_dim=16,
        qk_rope_head_dim=8,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=8,
        sliding_window=8,
        compress_rate_hca=8,
        dtype="float32",
        max_position_embeddings=4096,
        indexer=Indexer(index_n_heads=4, index_head_dim=8, index_topk=2),
        moe=MoE(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_hash_layers=1),
    )
    defaults = dict(steps=6, batch_size=2, warmup=2, log_every=2, checkpoint_every=3, eval_rows=4)
    return Config("micro", model, Data(source=source, seq_len=32), Train(**defaults | train))


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


def with_train(config: Config, **changes) -> Config:
    """`config` with other training fields."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
