"""The axis alphabet covers what the code uses."""

import ast
import itertools
import pathlib
import re

import v4jax
from v4jax.core.axes import LETTERS, LOGICAL
from v4jax.models.hf import deepseek_v4_params

PACKAGE = pathlib.Path(v4jax.__file__).parent


def names(path: pathlib.Path) -> set[str]:
    """Every variable, attribute and argument name in a file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {node.id for node in nodes if isinstance(node, ast.Name)}
    found |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return found | {node.arg for node in nodes if isinstance(node, ast.arg)}


def unknown_letters(names: set[str], known=frozenset(LETTERS)) -> set[str]:
    """Names such as `x_BTD` with a letter that is not `known`; digits are axes of that size."""
    suffixes = {name: re.fullmatch(r"\w*[a-z0-9]_([A-Z0-9]*[A-Z][A-Z0-9]*)", name) for name in names}
    return {name for name, match in suffixes.items() if match and set(re.sub(r"\d", "", match[1])) - known}


def test_axes_letters_cover_every_suffix():
    assert unknown_letters({"x_BTD", "row_1D", "plain", "MAX_QUERIES", "q_BTNH"}, {"B", "T", "D"}) == {"q_BTNH"}
    unknown = {path: unknown_letters(names(path)) for path in PACKAGE.rglob("*.py")}
    assert {str(path): found for path, found in unknown.items() if found} == {}


def test_axes_letters_cover_every_parameter():
    rules = itertools.chain(*deepseek_v4_params.RULES)
    used = {letter for rule in rules for letter in rule.axes if not letter.isdigit()}
    assert used <= set(LETTERS) and used <= set(LOGICAL)
