#!/usr/bin/env bash
# Train on Cloud TPU VMs, from a machine with gcloud.
# Hardware: one TPU v5p slice of 64 chips, topology 4x4x4 (accelerator type v5p-128, 16 hosts), of whose memory `v4jax
# plan` says 82 % is used, or any other slice whose name and zone are given.
#
#   launch/tpu_vm/train.sh NAME ZONE gs://BUCKET/DIR train --config=v4_flash --config.mesh.layout=pod \
#     --config.mesh.expert=64 --config.train.batch_size=128
#
# Copies this checkout to every host, installs it there, mounts the bucket (a checkpoint needs one file system for all
# hosts) and runs the command on all hosts at once; JAX finds them through the TPU's metadata. The same line again goes
# on from the newest checkpoint.
set -euo pipefail

if (($# < 4)); then
  echo "train.sh: usage: launch/tpu_vm/train.sh NAME ZONE gs://BUCKET/DIR train [flags]" >&2
  exit 1
fi
name=$1 zone=$2 store=${3#gs://}
shift 3
cd "$(dirname "$0")/../.."

on_all() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:v4jax.tar.gz" --zone="$zone" --worker=all
on_all "set -e
  mkdir -p v4jax runs
  tar -xzf v4jax.tar.gz -C v4jax
  if ! command -v gcsfuse > /dev/null; then sudo apt-get update -q && sudo apt-get install -qy gcsfuse; fi
  mountpoint -q runs || gcsfuse --implicit-dirs --only-dir=${store#*/} ${store%%/*} runs
  if [ ! -x venv/bin/v4jax ]; then python3 -m venv venv; fi
  venv/bin/pip install -q -e './v4jax[tpu]'"
on_all "venv/bin/v4jax $(printf '%q ' "$@") --workdir=runs"
