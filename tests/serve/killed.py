"""Run by a test: answers some requests, prints the tokens, and goes on with more requests until it is killed."""

import json
import sys

from tests.serve import small
from tests.serve.small import draw_model, drive
from tests.serve.tiered import one_by_one, tiered
from v4jax.serve import programs


def main(directory):
    from tests.serve.test_parking import CHATS

    for name, program in small.QUICK.items():
        setattr(programs, name, program)
    with tiered(draw_model(0), directory) as engine:
        print(json.dumps([answer.tokens for answer in one_by_one(engine, CHATS)]), flush=True)
        while True:
            drive(engine, CHATS)


if __name__ == "__main__":
    main(sys.argv[1])
