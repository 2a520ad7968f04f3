"""Writes the tables of v4jax/README.md that come from code: `python -m tests.readme_tables`, in the root directory.

A table stands between `<!-- NAME: ... -->` and `<!-- /NAME -->`. `tests/test_readmes.py` holds the file to `render`.
"""

import pathlib
import re

from tests.test_architecture import LAYERS
from v4jax.core.axes import LETTERS

PATH = pathlib.Path(__file__).resolve().parents[1] / "v4jax/README.md"


def letters() -> str:
    """The axis alphabet."""
    rows = [f"| {letter} | {meaning} |" for letter, meaning in LETTERS.items()]
    return "\n".join(["| letter | axis |", "|---|---|", *rows])


def layers() -> str:
    """Packages by layer, the highest first; those that the tree has."""
    present = [name for name in LAYERS if (PATH.parent / name).is_dir() or (PATH.parent / f"{name}.py").is_file()]
    numbers = sorted({LAYERS[name] for name in present}, reverse=True)
    rows = [f"| {number} | {', '.join(name for name in present if LAYERS[name] == number)} |" for number in numbers]
    return "\n".join(["| layer | packages |", "|---|---|", *rows])


def render(text: str) -> str:
    """`text` with both tables as the code has them."""
    for name, table in (("layers", layers()), ("letters", letters())):
        place = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = place.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"{PATH} has {count} places for the table {name!r}")
    return text


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
