"""One of two processes of two devices each, whose engine has tiers below it; a test starts both.

Arguments: directory of the model, directory of the tiers, rounds of questions. "h" is a round for which reads of the
second process hang, "a" one that asks all at once. Prints of every round what was answered, and counts so far, as JSON.
"""

import json
import os
import sys
import threading

import jax
import numpy as np

from v4jax import config
from v4jax.cache.offload import disk_tier
from v4jax.parallel import distributed
from v4jax.serve import LLM
from v4jax.serve.sampling_params import SamplingParams

TOKENS = 512  # room on a device: one conversation
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
LIMITS = {"max_num_seqs": 1, "max_num_batched_tokens": 64, "max_model_len": 576}


def prompts():
    """Conversations, twice as many as there are devices."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, 2048, 507).tolist() for _ in range(8)]


class Hanging(disk_tier.FileSystem):
    """A file system whose reads end when the gate opens."""

    gate = threading.Event()

    def read(self, name, most, at):
        """Late, if ever."""
        self.gate.wait(600)
        return super().read(name, most, at)


def main(model, directory, rounds):
    distributed.initialize(distributed.detect_process(os.environ), 120)
    cache = {
        "kv_cache_tokens": TOKENS,
        "kv_disk_bytes": 1 << 30,
        "kv_dir": directory,
        "kv_load_timeout_s": 3.0 if "h" in rounds else 60.0,
    }
    llm, said = LLM(model, mesh=config.Mesh("serve"), **cache, **LIMITS), []
    for kind in rounds:
        if kind == "h" and jax.process_index() == 1:
            llm.engine.kv_connector.transfer.disk._files = Hanging()
        answers = [[prompt] for prompt in prompts()] if kind != "a" else [prompts()]
        answers = [output.token_ids for asked in answers for output in llm.generate(asked, GREEDY)]
        said.append({"answers": answers, "restored": llm.stats()["restored_blocks"], "late": llm.stats()["disk_late"]})
    Hanging.gate.set()
    llm.close()
    print(json.dumps(said), flush=True)
    distributed.barrier("both are done")


if __name__ == "__main__":
    main(*sys.argv[1:])
