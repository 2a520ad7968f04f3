"""Makes golden files anew: `python -m tests.golden [logits] [shardings] [plans PLAN.json...]`, in the root directory.

Without arguments it makes `logits` and `shardings`. `logits` needs torch and transformers, which give them. `plans`
takes the records of `v4jax plan ... --stage=buffers --json=PLAN.json`, which need libtpu and minutes each. Read the
difference that git shows before it is committed: a golden file changes only where a commit means it to.
"""

import os
import sys


def main(arguments: list[str]) -> int:
    """Make what the arguments name; exit code."""
    from tests.golden import compiled, make_logits, shardings

    names = [name for name in arguments if not name.endswith(".json")] or ["logits", "shardings"]
    files = [name for name in arguments if name.endswith(".json")]
    unknown = [name for name in names if name not in ("logits", "shardings", "plans")]
    if unknown or (files and "plans" not in names) or ("plans" in names and not files):
        print(__doc__, file=sys.stderr)
        return 1
    if "logits" in names:
        make_logits.main()
    if "shardings" in names:
        shardings.main()
    if "plans" in names:
        compiled.main(files)
    return 0


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    sys.exit(main(sys.argv[1:]))
