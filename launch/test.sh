#!/usr/bin/env bash
# Make .venv-test, install v4jax with what its tests need, and run them. Arguments go to pytest: launch/test.sh -k rope
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh

# The registry's torch for Linux brings gigabytes of CUDA libraries that no test needs. Forbidding two of them makes
# pip give up before it downloads the rest, and still accept a build for CPUs.
install_torch() {
  install .venv-test torch==2.13.0 --constraint <(printf '%s\n' 'triton<0' 'cuda-bindings<0') 2> /dev/null
}

if ! is_installed .venv-test; then
  make_environment .venv-test
  echo "installing v4jax and what its tests need into .venv-test"
  extras="test"
  if install_torch; then
    extras=test,parity
  else
    echo "no torch for CPUs here, so tests against transformers will skip (cure: install one into .venv-test," \
      "then run .venv-test/bin/python -m pip install -e '.[test,parity]')"
  fi
  install .venv-test -e ".[$extras]"
  install_done .venv-test
fi

# worksteal: contiguous tests stay on one worker, so that what a file prepares is mostly prepared once.
exec .venv-test/bin/python -m pytest -n 2 --dist worksteal "$@"
