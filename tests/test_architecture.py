"""The rules that a program can check: layers, top level, file length, no trace of one machine."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

LAYERS = {
    "core": 0,
    "config": 1,
    "parallel": 2,
    "kernels": 2,
    "nn": 3,
    "engram": 3,
    "models": 4,
    "cache": 5,
    "checkpoint": 5,
    "data": 5,
    "train": 6,
    "serve": 6,
    "evals": 7,
    "tools": 7,
    "cli_flags": 8,
    "cli_completion": 9,
    "cli_generate": 9,
    "cli_serve": 9,
    "engine_flags": 9,
    "cli": 10,
    "__main__": 11,
}

TOP_LEVEL = {"pyproject.toml", "README.md", "v4jax", "configs", "tests", "launch", "notebooks"}
MAX_LINES = 500
TEXT = {".py", ".toml", ".md", ".sh", ".txt", ".json", ".jsonl", ".yaml", ".yml", ".ipynb", ".cfg", ".ini", ""}

# Written in pieces, so that this file is not its own breach.
MACHINE = re.compile(
    "|".join(
        [
            r"(?<![\w.])/" + r"(work|root|home|Users|opt|mnt)/\w",
            "pypi" + r"\.org",
            "files\\.python" + "hosted",
            "download\\.py" + "torch",
            r"--(extra-)?index" + "-url",
            r"--find" + "-links",
        ]
    )
)


def imported_packages(path: pathlib.Path, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """(line, dotted module) of every import, at top level or inside functions; relative ones made absolute.

    `from v4jax import nn` and `from v4jax.nn import mhc` both count as a module below `v4jax`. `package` is the
    dotted name of the folder that holds `path`, in parts.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
    return found


def layer_breaches(root: pathlib.Path) -> list[str]:
    """Imports that go up or sideways between the packages of `root`/v4jax, and foreign imports in `root`/configs."""
    breaches = []
    for path in sorted((root / "v4jax").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        home = parts[1]
        if home == "__init__":
            home = "config"  # `import v4jax` may import eagerly only what config may
        if home not in LAYERS:
            breaches.append(f"{path.relative_to(root)}: {home} has no layer")
            continue
        for line, module in imported_packages(path, parts[:-1]):
            names = module.split(".")
            target = names[1] if names[0] == "v4jax" and len(names) > 1 else None
            if target not in LAYERS or target == home:
                continue
            if LAYERS[target] >= LAYERS[home]:
                breaches.append(
                    f"{path.relative_to(root)}:{line}: {home} ({LAYERS[home]}) imports {target} ({LAYERS[target]})"
                )
    for path in sorted((root / "configs").rglob("*.py")):
        for line, module in imported_packages(path, ("configs",)):
            if module not in ("dataclasses", "v4jax.config") and not module.startswith("v4jax.config."):
                breaches.append(
                    f"{path.relative_to(root)}:{line}: configs import only dataclasses and v4jax.config, not {module}"
                )
    return breaches


def top_level_breaches(files: list[str]) -> list[str]:
    names = {file.split("/")[0] for file in files}
    return sorted(name for name in names if name not in TOP_LEVEL and not name.startswith("."))


def length_breaches(root: pathlib.Path, files: list[str]) -> list[str]:
    lengths = {
        file: len((root / file).read_text(encoding="utf-8").splitlines())
        for file in files
        if file.endswith((".py", ".sh"))
    }
    return [f"{file}: {length} lines" for file, length in lengths.items() if length > MAX_LINES]


def machine_breaches(root: pathlib.Path, files: list[str]) -> list[str]:
    """Lines of text files that name a path of one machine or the address of a package registry."""
    breaches = []
    for file in files:
        if pathlib.PurePath(file).suffix in TEXT:
            lines = (root / file).read_text(encoding="utf-8").splitlines()
            breaches += [
                f"{file}:{number}: {line.strip()[:80]}" for number, line in enumerate(lines, 1) if MACHINE.search(line)
            ]
    return breaches


def test_packages_import_only_from_lower_layers():
    assert layer_breaches(ROOT) == []


def test_every_package_has_a_layer():
    packages = {path.name for path in (ROOT / "v4jax").iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert packages <= set(LAYERS)


def test_top_level_is_the_agreed_one(project_files):
    assert top_level_breaches(project_files) == []


def test_files_are_short(project_files):
    assert length_breaches(ROOT, project_files) == []


def test_no_file_names_a_machine_or_a_registry(project_files):
    assert machine_breaches(ROOT, project_files) == []


@pytest.mark.parametrize(
    "path, source, complaint",
    [
        ("v4jax/nn/a.py", "from v4jax.models import forward", "nn (3) imports models (4)"),
        ("v4jax/nn/b.py", "def f():\n    import v4jax.serve.engine", "nn (3) imports serve (6)"),
        ("v4jax/train/c.py", "from v4jax import serve", "train (6) imports serve (6)"),
        ("v4jax/serve/deep/d.py", "from ...train import loop", "serve (6) imports train (6)"),
        ("v4jax/core/e.py", "from ..nn.norm import Norm", "core (0) imports nn (3)"),
        ("v4jax/__init__.py", "from v4jax.serve import LLM", "config (1) imports serve (6)"),
        ("v4jax/extra/f.py", "x = 1", "extra has no layer"),
        ("configs/g.py", "import jax", "not jax"),
        ("configs/h.py", "from v4jax import nn", "not v4jax.nn"),
        ("configs/bench/i.py", "import jax", "not jax"),
    ],
)
def test_layer_checker_sees_a_planted_breach(tmp_path, path, source, complaint):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    breaches = layer_breaches(tmp_path)
    assert len(breaches) == 1 and path in breaches[0] and complaint in breaches[0]


@pytest.mark.parametrize(
    "path, source",
    [
        (
            "v4jax/nn/a.py",
            "from v4jax.core import axes\nfrom v4jax.kernels import moe\nimport v4jax.config\nimport jax",
        ),
        ("v4jax/nn/b.py", "from . import norm\nfrom .rope import rotate\nfrom ..core.errors import UserError"),
        ("v4jax/config.py", "from v4jax.core.errors import UserError"),
        ("v4jax/cli.py", "import v4jax\nfrom v4jax.train import loop\nfrom v4jax.serve import LLM"),
        ("configs/c.py", "from v4jax.config import Config\nfrom v4jax import config\nimport v4jax.config"),
    ],
)
def test_layer_checker_lets_good_imports_pass(tmp_path, path, source):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    assert layer_breaches(tmp_path) == []


def test_other_checkers_see_planted_breaches(tmp_path):
    (tmp_path / "long.py").write_text("x = 1\n" * (MAX_LINES + 1))
    note = ["see /" + "ho" + "me/me/run", "see https://py" + "pi.org/simple", "fine: runs/tiny, a/wo" + "rk/b"]
    (tmp_path / "note.md").write_text("\n".join(note))
    assert length_breaches(tmp_path, ["long.py", "note.md"]) == [f"long.py: {MAX_LINES + 1} lines"]
    assert [breach[:9] for breach in machine_breaches(tmp_path, ["long.py", "note.md"])] == ["note.md:1", "note.md:2"]
    assert top_level_breaches(["v4jax/cli.py", "scripts/x.py", ".ci/run", "notes.txt"]) == ["notes.txt", "scripts"]
