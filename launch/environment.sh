# shellcheck shell=bash
# Sourced by the launch scripts from the repository root: finds a Python, makes virtual environments, installs into them.

# XLA on CPUs spends much of its time in page faults; huge pages avoid most of them. Other C libraries ignore this.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1"
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 1
}

# Print the first Python that is new enough and can make environments. Running it is the test: shims may exist in vain.
find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer with venv found; install one (on Debian and Ubuntu: apt install python3 python3-venv)"
}

# What an environment was installed from. It changes with the dependencies, and when the checkout has moved.
fingerprint() {
  echo "$PWD $(cksum < pyproject.toml)"
}

# is_installed DIR: whether install_done was reached in DIR for this checkout and these dependencies.
is_installed() {
  [[ -f $1/installed && $(< "$1/installed") == "$(fingerprint)" ]] && "$1/bin/python" -c "" 2>/dev/null
}

# make_environment DIR: a usable environment in DIR; what an interrupted installation left there is kept.
make_environment() {
  local made=$PWD python
  if [[ -f $1/made ]]; then made=$(< "$1/made"); fi
  # Environments hold absolute paths, so one that came along with a moved checkout is of no use.
  if [[ $made != "$PWD" ]] || ! "$1/bin/python" -m pip --version > /dev/null 2>&1; then
    python=$(find_python)
    echo "making $1 with $("$python" --version)"
    "$python" -m venv --clear "$1"
    echo "$PWD" > "$1/made"
  fi
  rm -f "$1/installed"
}

# install DIR ARGUMENTS...: pip without its chatter; errors stay.
install() {
  local directory=$1
  shift
  "$directory/bin/python" -m pip install -qq "$@"
}

install_done() {
  fingerprint > "$1/installed"
}
