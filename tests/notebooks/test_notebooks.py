"""Every notebook runs from its first cell to its last, and is stored without what running left in it."""

import ast
import json
import pathlib
import sys

import jax
import matplotlib
import pytest
from matplotlib import pyplot

import v4jax

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


def code_cells(notebook: dict) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture
def quick_compiler():
    """Compilation is nearly all that a notebook's time goes into."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch, tmp_path, quick_compiler):
    """In one namespace and without Jupyter, so a line that only Jupyter understands (`!`, `%`) is a SyntaxError."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    namespace = {"__name__": "__main__"}
    for number, source in enumerate(code_cells(json.loads(path.read_text(encoding="utf-8")))):
        exec(compile(source, f"{path.name}[code cell {number}]", "exec"), namespace)
    assert pyplot.get_fignums(), "a notebook shows something"
    pyplot.close("all")
    assert list(tmp_path.iterdir()) == [], "a notebook leaves nothing behind"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_public_names_alone(path):
    for source in code_cells(json.loads(path.read_text(encoding="utf-8"))):
        for node in ast.walk(ast.parse(source, feature_version=(3, 11))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [module for module in modules if module.startswith("v4jax.")], source
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "v4jax":
                assert node.attr in v4jax.__all__


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_from_its_one_variable(path, monkeypatch, tmp_path, capsys):
    first, calls = code_cells(json.loads(path.read_text(encoding="utf-8")))[0], []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, check: calls.append(command))
    monkeypatch.chdir(path.parent)
    exec(first, {})
    assert calls.pop() == [sys.executable, "-m", "pip", "install", "--quiet", ".."]
    assert capsys.readouterr().out.startswith("Restart the session")  # numpy is loaded here, as it may be in Colab
    exec(first.replace('SOURCE = ".."', 'SOURCE = "git+https://example.org/v4jax.git"'), {})
    assert calls.pop()[-1] == "git+https://example.org/v4jax.git"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="set SOURCE"):
        exec(first, {})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stores_no_results(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    stored = [cell for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count") is not None]
    assert stored == [] and notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
