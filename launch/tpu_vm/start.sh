#!/usr/bin/env bash
# Run by train.sh on every host, in the home directory: start.sh COMMAND [flags]. Starts v4jax as the unit `v4jax`.
# Hardware: a TPU VM, whose metadata server lists the hosts of the slice.
set -euo pipefail

metadata() {
  curl -fsS -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# A plain TPU VM sets no TPU_WORKER_HOSTNAMES (GKE does), so v4jax gets its place from JAX's own variables. An entry is
# the name of a host, or NAME:ID:ADDRESS on older machines.
index=$(metadata agent-worker-number)
IFS=, read -ra hosts <<< "$(metadata worker-network-endpoints)"
place=()
if ((${#hosts[@]} > 1)); then
  place=("--setenv=JAX_COORDINATOR_ADDRESS=${hosts[0]##*:}" "--setenv=JAX_NUM_PROCESSES=${#hosts[@]}"
    "--setenv=JAX_PROCESS_ID=$index")
fi
# systemd keeps it running after the connection has ended. `systemctl stop` sends SIGTERM, on which v4jax saves.
sudo systemd-run --quiet --unit=v4jax --collect --uid="$(id -u)" --working-directory="$PWD" \
  --setenv=HOME="$HOME" --property=TimeoutStopSec=600 --property=LimitMEMLOCK=infinity "${place[@]}" \
  "$PWD/venv/bin/v4jax" "$@" --workdir="$PWD/runs"
