"""Run by a test: answers some requests, prints the tokens, and goes on with more requests until it is killed."""

import json
import sys

from tests.serve.engine_harness import draw_model, drive
from tests.serve.offload_harness import one_by_one, tiered


def main(directory):
    from tests.serve.test_offload_connector import CHATS

    with tiered(draw_model(0), directory) as engine:
        print(json.dumps([answer.tokens for answer in one_by_one(engine, CHATS)]), flush=True)
        while True:
            drive(engine, CHATS)


if __name__ == "__main__":
    main(sys.argv[1])
