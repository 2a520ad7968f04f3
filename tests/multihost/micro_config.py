"""A config file for runs of several processes: the smallest model in which tokens travel and layers differ."""

from tests.micro_model import divisible
from v4jax.config import Config, Data, Train


def get_config(arg: str = "") -> Config:
    """`arg` is the file of text to train on."""
    train = Train(steps=20, batch_size=8, warmup=2, log_every=1, checkpoint_every=5, eval_rows=8, lr=5e-3, adam_lr=5e-3)
    return Config("micro", divisible(), Data(source=arg, seq_len=32), train)
