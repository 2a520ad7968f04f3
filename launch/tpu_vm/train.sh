#!/usr/bin/env bash
# Train on Cloud TPU VMs, from a machine with gcloud.
# Hardware: one TPU v5p slice of 64 chips, topology 4x4x4 (accelerator type v5p-128, 16 hosts), of whose memory `v4jax
# plan` reports 82 % is used, or any other slice whose name and zone are given.
#
#   launch/tpu_vm/train.sh NAME ZONE gs://BUCKET/DIR train --config=v4_flash --config.mesh.rules=pod \
#     --config.mesh.expert=64 --config.train.batch_size=128
#   launch/tpu_vm/train.sh NAME ZONE log     # follows host 0
#   launch/tpu_vm/train.sh NAME ZONE stop    # saves, then ends
#
# Copies this checkout to every host, installs it there, mounts the bucket (a checkpoint needs one file system for all
# hosts) and starts the command on all hosts at once, as the systemd unit `v4jax`: it goes on when this terminal is
# closed. The same line again goes on from the newest checkpoint.
set -euo pipefail

usage() {
  echo "train.sh: usage: launch/tpu_vm/train.sh NAME ZONE (gs://BUCKET/DIR train [flags] | log | stop)" >&2
  exit 1
}

if (($# < 3)); then usage; fi
name=$1 zone=$2
shift 2
cd "$(dirname "$0")/../.."

# on HOSTS COMMAND: HOSTS are a number, or all.
on() {
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

case "$1" in
  log)
    on 0 "journalctl --unit=v4jax --follow --lines=50"
    exit
    ;;
  stop)
    on all "sudo systemctl stop v4jax"
    exit
    ;;
  gs://?*/?*) if (($# < 2)); then usage; fi ;;
  *) usage ;;
esac
store=${1#gs://}
shift

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:v4jax.tar.gz" --zone="$zone" --worker=all
on all "mkdir -p v4jax && tar -xzf v4jax.tar.gz -C v4jax && v4jax/launch/tpu_vm/setup.sh ${store%%/*} ${store#*/}"
on all "v4jax/launch/tpu_vm/start.sh $(printf '%q ' "$@")"
echo "started; to follow it: launch/tpu_vm/train.sh $name $zone log"
