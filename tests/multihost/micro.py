"""A config file for runs of several processes: the smallest model in which tokens travel and layers differ."""

from v4jax.config import Config, Data, Indexer, Model, Moe, Train


def get_config(arg: str = "") -> Config:
    """`arg` is the file of text to train on."""
    model = Model(
        vocab_size=2048, hidden_size=32, schedule=("csa",), heads=4, head_dim=16, rope_dim=8, q_rank=16, o_groups=2,
        o_rank=8, window=8, hca_ratio=8, dtype="float32", max_positions=4096, mtp_layers=0,
        indexer=Indexer(heads=4, head_dim=8, topk=2), moe=Moe(experts=8, active=2, inner=16, hash_layers=0),
    )  # fmt: skip
    train = Train(steps=20, batch_size=8, warmup=2, log_every=1, checkpoint_every=5, eval_rows=8, lr=5e-3, adam_lr=5e-3)
    return Config("micro", model, Data(source=arg, seq_len=32), train)
