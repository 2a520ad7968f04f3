"""The last lines of a run."""

from v4jax.config import Data
from v4jax.train.summary import closing_lines


def test_the_last_lines_say_where_all_is_and_what_comes_next():
    summary = {"heldout_loss": 1.5, "checkpoint": "my runs/a", "plot": "my runs/a/loss.png"}
    text = {"heldout_bits_per_byte": 2.0, "xz_bits_per_byte": 2.5, "trigram_bits_per_byte": 2.75}
    assert closing_lines(summary | text, Data()).splitlines() == [
        "held-out loss  1.5000 nats a token, 2.000 bits per byte (xz 2.500, byte trigram 2.750)",
        "checkpoint     my runs/a",
        "plot           my runs/a/loss.png",
        "summary        my runs/a/summary.json",
        "next           v4jax generate --checkpoint='my runs/a' --prompt=\"Once upon a time\"",
        "               v4jax eval --checkpoint='my runs/a' --suite=perplexity",
    ]
    needle = closing_lines(summary, Data(source="needle")).splitlines()
    assert needle[-1].endswith("v4jax eval --checkpoint='my runs/a' --suite=needle")
    files = closing_lines(summary | text, Data(source="my/*.txt", heldout="b.txt")).splitlines()
    assert files[-1].endswith("--suite=perplexity --data='my/*.txt' --heldout=b.txt")
