"""READMEs: where they are, what they link to, and that the tables that come from code are those of the code."""

import pathlib
import re

import pytest

from tests import readme_tables

ROOT = pathlib.Path(__file__).resolve().parents[1]
FRONT_LINES = 150
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_NAMED = re.compile(r"`((?:v4jax|configs|tests|launch|notebooks)/[\w./*-]+\.\w+)`")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Names that GitHub gives to the headings of a Markdown file."""
    heads = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def broken_links(root: pathlib.Path, files: list[pathlib.Path]) -> list[str]:
    """Relative links of Markdown files to what is not there, as "path: link"."""
    broken = []
    for path in files:
        for link in _LINK.findall(_FENCE.sub("", path.read_text(encoding="utf-8"))):
            name, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = path.parent / name if name else path
            missing = not target.exists()
            if missing or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
                broken.append(f"{path.relative_to(root).as_posix()}: {link}")
    return broken


def missing_files(root: pathlib.Path, files: list[pathlib.Path]) -> list[str]:
    """Files named in backticks, from the root on, that are not there, as "path: name"; names may hold a `*`."""
    return [
        f"{path.relative_to(root).as_posix()}: {name}"
        for path in files
        for name in _NAMED.findall(path.read_text(encoding="utf-8"))
        if not any(root.glob(name))
    ]


@pytest.fixture(scope="module")
def files(project_files) -> list[pathlib.Path]:
    """Markdown files of the project."""
    return [ROOT / file for file in project_files if file.endswith(".md")]


def test_links_have_targets(files):
    assert broken_links(ROOT, files) == []


def test_link_checker_sees_a_planted_breach(tmp_path):
    (tmp_path / "b.md").write_text("# One, two: three\n```\n# four\n```\n")
    links = "[a](b.md) [b](b.md#one-two-three) [c](c.md) [d](b.md#four) [e](https://example.org)"
    (tmp_path / "a.md").write_text(f"{links}\n```\n[f](f.md)\n```\n")
    assert broken_links(tmp_path, [tmp_path / "a.md"]) == ["a.md: c.md", "a.md: b.md#four"]


def test_named_files_exist(files):
    assert missing_files(ROOT, files) == []


def test_file_checker_sees_a_planted_breach(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").touch()
    (tmp_path / "a.md").write_text("`tests/test_a.py`, `tests/test_*.py`, `tests/test_b.py`, `b.py`, `v4jax/*/c.json`")
    assert missing_files(tmp_path, [tmp_path / "a.md"]) == ["a.md: tests/test_b.py", "a.md: v4jax/*/c.json"]


def test_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= FRONT_LINES


def test_every_package_has_a_readme():
    packages = [path for path in (ROOT / "v4jax").iterdir() if path.is_dir() and any(path.glob("*.py"))]
    assert [path.name for path in packages if not (path / "README.md").is_file()] == []


def test_generated_tables_are_those_of_the_code():
    """`python -m tests.readme_tables` writes them."""
    text = readme_tables.PATH.read_text(encoding="utf-8")
    assert readme_tables.render(text) == text
