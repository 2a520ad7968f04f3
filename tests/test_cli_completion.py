"""Completion in bash and zsh: the script is sourced and asked for candidates."""

import shlex
import shutil
import subprocess

import pytest

from v4jax import cli

COMPLETIONS = [
    ("v4jax ", {"train", "generate", "convert", "plan", "bench", "eval", "serve", "completion", "--help", "--version"}),
    ("v4jax tr", {"train"}),
    ("v4jax train --config=ti", {"tiny"}),
    ("v4jax train --wor", {"--workdir="}),
    ("v4jax train --config.train.hang_t", {"--config.train.hang_timeout_s="}),
    ("v4jax bench --suite=tr", {"train"}),
    ("v4jax generate --prompt=x --kv_eviction_policy=", {"s3fifo", "lru"}),
    ("v4jax generate --checkpoint=ru", set()),
    ("v4jax generate --co", {"--compilation_cache=", "--coordinator="}),
]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_completes(capsys, tmp_path, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    assert cli.main(["completion", shell]) == 0
    out = capsys.readouterr().out
    (tmp_path / "v4jax.sh").write_text(out if shell == "bash" else out.split("autoload")[0])
    lines = "\n".join(f"try {shlex.quote(line)}" for line, _ in COMPLETIONS)
    (tmp_path / "try.sh").write_text(
        f"compopt() {{ :; }}\nsource {tmp_path / 'v4jax.sh'}\n"
        'try() { COMP_LINE="$1"; COMP_POINT=${#1}; _v4jax; echo "${COMPREPLY[*]}"; }\n' + lines
    )
    done = subprocess.run([shell, str(tmp_path / "try.sh")], capture_output=True, text=True, check=True)
    whole = lambda line, words: {line.split()[-1].split("=")[0] + "=" + w if "=" in line[-20:] else w for w in words}
    for (line, words), found in zip(COMPLETIONS, done.stdout.split("\n"), strict=False):
        assert set(found.split()) == (words if shell == "bash" else whole(line, words)), line
