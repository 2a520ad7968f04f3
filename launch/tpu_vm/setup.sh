#!/usr/bin/env bash
# Run by train.sh on every host, in the home directory: setup.sh BUCKET DIR. What is installed already is kept.
# Hardware: a TPU VM (Ubuntu; its images for v4 to v6e bring Python 3.10, and v4jax needs 3.11).
set -euo pipefail

bucket=$1 directory=$2
mkdir -p runs

if ! command -v gcsfuse > /dev/null; then # no distribution has it: it comes from Google's own repository
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" > /dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  # A new machine installs its own updates first and holds the lock meanwhile.
  sudo apt-get -o DPkg::Lock::Timeout=600 update -q
  sudo apt-get -o DPkg::Lock::Timeout=600 install -qy gcsfuse
fi
if ! mountpoint -q runs; then
  gcsfuse --implicit-dirs --only-dir="$directory" "$bucket" runs
fi

if [[ ! -x venv/bin/python ]]; then
  python3 -m pip install -q --user uv
  ~/.local/bin/uv venv --quiet --python=3.12 venv
fi
~/.local/bin/uv pip install --quiet --python=venv/bin/python -e './v4jax[tpu]'
