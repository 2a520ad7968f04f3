"""Every "spec N.M" that the tree cites is a heading of v4jax/models/SPEC.md; nothing cites a text outside the tree."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SPEC = ROOT / "v4jax/models/SPEC.md"
FOLDERS = ("v4jax", "tests", "configs", "launch", "notebooks")
TEXT = {".py", ".md", ".sh", ".ipynb", ".toml", ".yaml", ".yml"}

# A citation may list several numbers, and may go on in the next line of a comment.
_NUMBER = r"\d+(?:\.\d+)?"
_CITATION = re.compile(rf"\bspec\s+(?:#\s*)?({_NUMBER}(?:(?:, | and | to )(?:\d+\.\d+|\d+(?=\))))*)")
# Numbers of lists that are kept outside of the tree.
_FOREIGN = re.compile(r"\bspec, (?:appendix|notation|section)\b|\bmistake \d+")


def headings(text: str) -> set[str]:
    """Numbers of all headings of a specification."""
    return set(re.findall(rf"^#{{2,3}} ({_NUMBER}) \S", text, re.MULTILINE))


def breaches(root: pathlib.Path, known: set[str]) -> list[str]:
    """Citations below `root` that no heading answers, as "path: number"."""
    found = []
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in TEXT)
    for path in paths:
        if path == pathlib.Path(__file__).resolve():
            continue  # what it plants
        text = path.read_text(encoding="utf-8")
        where = path.relative_to(root).as_posix()
        numbers = [number for cited in _CITATION.findall(text) for number in re.findall(_NUMBER, cited)]
        found += [f"{where}: {number}" for number in numbers if number not in known]
        found += [f"{where}: {match.group(0)}" for match in _FOREIGN.finditer(text)]
    return found


def test_citations_resolve_to_headings():
    known = headings(SPEC.read_text(encoding="utf-8"))
    assert {"1", "2.3", "12.3"} <= known
    assert breaches(ROOT, known) == []


@pytest.mark.parametrize(
    "text, want",
    [
        ("the window (spec 2.5, 7.7)", ["7.7"]),
        ("# as spec\n# 77.1 holds", ["77.1"]),
        ("spec 2.5 and 7.8 are both", ["7.8"]),
        ("spec 8", ["8"]),
        ("a weight (mistake 22)", ["mistake 22"]),
        ("made by another (spec, appendix C)", ["spec, appendix"]),
        ("spec 2.5, in 3 parts; a spec of 4", []),
    ],
)
def test_citation_checker_sees_planted_breaches(tmp_path, text, want):
    (tmp_path / "v4jax").mkdir()
    (tmp_path / "v4jax/a.py").write_text(text)
    assert breaches(tmp_path, {"2.5"}) == [f"v4jax/a.py: {number}" for number in want]


def test_headings_have_unique_numbers_and_titles():
    lines = re.findall(rf"^#{{2,3}} ({_NUMBER}) \S.*$", SPEC.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == len(set(lines))
    assert lines == sorted(lines, key=lambda number: [int(part) for part in number.split(".")])
