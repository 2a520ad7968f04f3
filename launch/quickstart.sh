#!/usr/bin/env bash
# shellcheck source-path=SCRIPTDIR/..
# Make .venv, install v4jax, train the `tiny` config on the embedded text, generate from it, print what was measured.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/quickstart.sh [--fresh]

Makes .venv, installs v4jax in it, trains `tiny` on the embedded text, lets the model continue a line and prints a
table: 6 minutes after the installation on two cores. A slow machine makes fewer steps, at least half of them. Run
again, it resumes what was interrupted or shows a finished run at once.

  --fresh   train from the beginning again (removes runs/tiny)
TEXT
}

fresh=0
for argument in "$@"; do
  case "$argument" in
    --fresh) fresh=1 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "quickstart: unknown option $argument; see launch/quickstart.sh --help" >&2; exit 1 ;;
  esac
done

cd "$(dirname "$0")/.."
source launch/environment.sh

if ! is_installed .venv; then
  make_environment .venv
  echo "installing v4jax and what it needs into .venv"
  install .venv -e .
  install_done .venv
fi
if ((fresh)); then rm -rf runs/tiny; fi
# Of 360 seconds, 45 are for imports and for `generate`, which compiles programs of its own.
if [[ ! -f runs/tiny/summary.json ]]; then
  .venv/bin/v4jax train --config=tiny --workdir=runs/tiny --config.train.max_seconds=315
fi

prompt="To be, or not to be"
text=$(.venv/bin/v4jax generate --checkpoint=runs/tiny --prompt="$prompt" --max_tokens=120 --temperature=0.8 --seed=0)
printf '\n%s%s\n' "$prompt" "$text"

.venv/bin/python - runs/tiny/summary.json <<'PYTHON'
import json, sys

with open(sys.argv[1], encoding="utf-8") as file:
    summary = json.load(file)
rows = [
    ("steps", "steps", "{}"),
    ("held-out bits per byte, v4jax tiny", "heldout_bits_per_byte", "{:.3f}"),
    ("  the same text, byte trigram model", "trigram_bits_per_byte", "{:.3f}"),
    ("  the same text, xz -9", "xz_bits_per_byte", "{:.3f}"),
    ("training speed, tokens per second", "tokens_per_second", "{:,.0f}"),
    ("checkpoint", "checkpoint", "{}"),
    ("loss plot", "plot", "{}"),
]
print()
for label, key, form in rows:
    value = summary[key]  # no speed if the run was stopped after its last step
    print(f"{label:<38}{'not measured' if value is None else form.format(value)}")
PYTHON
