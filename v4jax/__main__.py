"""`python -m v4jax <command>`, the same as `v4jax <command>`."""

import sys

from v4jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
