"""ruff finds nothing to report or to format and basedpyright no wrong type, by the configuration in pyproject.toml."""

import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TYPES = ("basedpyright", "--level", "error", "--pythonpath", sys.executable)


def run(*arguments: str, at: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    """Run a module of this Python in the directory `at`, as a program of its own."""
    return subprocess.run([sys.executable, "-m", *arguments], cwd=at, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments", [["check", "--no-cache"], ["format", "--check", "--no-cache"]], ids=["check", "format"]
)
def test_ruff_is_clean(arguments):
    done = run("ruff", *arguments, ".")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_types_are_right():
    done = run(*TYPES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_type_checker_sees_a_planted_breach(tmp_path):
    """The configuration of the tree is copied, so that a setting that finds nothing fails."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["basedpyright"]["include"]
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    planted = tmp_path / folders[0] / "planted.py"
    planted.write_text("def half(x: int | None) -> int:\n    return x // 2\n")
    done = run(*TYPES, at=tmp_path)
    assert done.returncode == 1 and "planted.py:2" in done.stdout and "reportOptionalOperand" in done.stdout
