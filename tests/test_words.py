"""Retired words and unknown axis letters: no file of the tree has them (see `v4jax/README.md`, glossary and letters).

A word with a second, common meaning is matched only in the context of the retired one. "arm" and "record" are not in
the list: the glossary defines both.
"""

import io
import pathlib
import re
import tokenize
from collections.abc import Collection
from typing import NamedTuple

import pytest

from v4jax.core.axes import LETTERS

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = {".py", ".md", ".toml", ".sh", ".yaml", ".yml", ".sbatch", ".ipynb", ".Dockerfile"}
# The subject of these two files is words: the list itself, and the corpus with the Bible's books.
SKIPPED = {
    "tests/test_words.py": "holds the list",
    "v4jax/data/build_corpus.py": "a corpus is made of books",
}


class Retired(NamedTuple):
    """A word that the field has another word for.

    Attributes:
        pattern: regular expression, matched on a line without regard to case.
        instead: what to write.
        example: a line that has the word.
    """

    pattern: str
    instead: str
    example: str


RETIRED = [
    Retired(r"\b(new_)?books\b", "state, index, counters", "the books of the cache are wrong"),
    Retired(r"\btold\b", "notified", "an engine that commits when it is told to"),
    Retired(r"\bsays\b", "reports, is", "`holds` says whether the bound holds"),
    Retired(r"\blies\b", "is stored, is", "state that lies in host memory"),
    Retired(r"\belsewhere\b(?! [A-Za-z]+ )", "name the place", "exact on TPUs, plausible elsewhere"),
    Retired(r"\b(as here|as there|is there already)\b(?! (is|are|was|can))", "on the device", "encoded here, as there"),
    Retired(r"\b(life|lives) of (a|the|one) (request|sequence)\b|\bin (this|its|one) life\b", "run", "in this life"),
    Retired(r"\b(company|companies) of requests\b|\bcompanies\b", "request mix", "Companies of requests"),
    Retired(r"\bso (many|much)\b(?! (as|that)\b)", "N, the given number", "outcomes of so many flips"),
    Retired(r"\b(the|of) picks\b|\bpicks (of|are|that|found)\b", "top-k indices", "the picks of a decode step"),
    Retired(r"\b(begins?|began|begun) behind\b", "resume after", "blocks that it can begin behind"),
    Retired(r"\b(comes?|came|coming|goes|went|going) (up|down)\b", "load, offload", "what came up from the disk"),
    Retired(r"\b(is|was|were|comes?|came|counts? as) late\b", "timed out", "a load that is late"),
    Retired(r"\bnobody('s)?\b", "null, no request, no process", "page 0 belongs to nobody"),
    Retired(
        r"\bwhole (arrays|weights|parameters) on\b|\b(held|kept|left) whole\b", "unsharded", "a table is kept whole"
    ),
    Retired(r"\b(first|upper|lower|higher|next|every|each|\w+'s) floor\b|\bfloor \d+:", "layer", "Floor 5: the caches"),
    Retired(
        r"\b(the|this|of|a) house\b|\bhouse (rule|style|test)s?\b|\battic\b|\btongues?\b", "architecture", "the house"
    ),
    Retired(r"\b(bays?|parking)\b", "connector", "all(bay.idle for bay in bays)"),
    Retired(
        r"(quanti|orthogonali|normali|initiali|seriali|tokeni|optimi|materiali)s(e|ed|er|es|ing|ation)\b",
        "American spelling, -ize",
        "quantised weights",
    ),
    Retired(r"\b(behaviou|colou|favou|neighbou)r", "American spelling, -or", "the behaviour of a step"),
]

NAME = re.compile(r"[a-z_]\w*_([A-Z0-9]*[A-Z][A-Z0-9]*)")  # a variable with a suffix of axes, such as q_BTNH
EINSUM = re.compile(r"""["'][A-Za-z0-9. ]*(,[A-Za-z0-9. ]*)*->[A-Za-z0-9. ]*["']""")


def retired_words(root: pathlib.Path, files: list[str]) -> list[str]:
    """Lines of text files that have a retired word, each with the words to write instead."""
    breaches = []
    patterns = [(re.compile(word.pattern, re.IGNORECASE), word.instead) for word in RETIRED]
    for file in files:
        if pathlib.PurePath(file).suffix not in TEXT or file in SKIPPED:
            continue
        for number, line in enumerate((root / file).read_text(encoding="utf-8").splitlines(), 1):
            breaches += [
                f"{file}:{number}: {found[0]!r} is retired; write: {instead}"
                for pattern, instead in patterns
                if (found := pattern.search(line))
            ]
    return breaches


def unknown_letters(root: pathlib.Path, files: list[str], known: Collection[str] = tuple(LETTERS)) -> list[str]:
    """Names and einsum strings of Python files with an upper-case letter that `known` lacks.

    A digit is an axis of that size.
    """
    breaches = []
    for file in files:
        if not file.endswith(".py"):
            continue
        text = (root / file).read_text(encoding="utf-8")
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            letters = ""
            if token.type == tokenize.NAME and (match := NAME.fullmatch(token.string)):
                letters = match[1]
            elif token.type == tokenize.STRING and EINSUM.fullmatch(token.string):
                letters = token.string
            unknown = sorted({letter for letter in letters if letter.isupper()} - set(known))
            if unknown:
                breaches.append(f"{file}:{token.start[0]}: {token.string} has no axis {', '.join(unknown)}")
    return breaches


def test_no_file_has_a_retired_word(project_files):
    assert retired_words(ROOT, project_files) == []


def test_names_have_only_letters_of_the_alphabet(project_files):
    assert unknown_letters(ROOT, project_files) == []


def test_skipped_files_exist(project_files):
    assert set(SKIPPED) <= set(project_files)


@pytest.mark.parametrize("word", RETIRED, ids=lambda word: word.example)
def test_word_checker_sees_a_planted_breach(tmp_path, word):
    (tmp_path / "a.py").write_text(f'x = 1\n"""Fine, then {word.example}."""\n')
    (tmp_path / "b.md").write_text(word.example)
    (tmp_path / "c.npz").write_text(word.example)
    assert [breach.split(": ")[0] for breach in retired_words(tmp_path, ["a.py", "b.md", "c.npz"])] == [
        "a.py:2",
        "b.md:1",
    ]


def test_word_checker_lets_other_meanings_pass(tmp_path):
    lines = [
        "i < floor((t + 1) / r), math.floor(x)",
        "a notebook of a bookkeeper, and Bayesian days",
        "there is no such file; the same holds here",
        "a copy of the whole array, later than the rest",
        "a step picks topk entries",
        "import optimizer; promise, otherwise, precise",
    ]
    (tmp_path / "fine.md").write_text("\n".join(lines))
    assert retired_words(tmp_path, ["fine.md"]) == []


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("x_BT = q_BTQ", "q_BTQ has no axis Q"),
        ("y = x_BT[0]; state_Q2 = 0", "state_Q2 has no axis Q"),
        ("z = f('BT,TD->BD')", "'BT,TD->BD' has no axis D"),
    ],
)
def test_letter_checker_sees_a_planted_breach(tmp_path, line, complaint):
    (tmp_path / "a.py").write_text(f"count_5 = x_1 = MAX_SIZE = 1\n{line}\ny = f('bt,td->bd')\n")
    assert unknown_letters(tmp_path, ["a.py"], "BT") == [f"a.py:2: {complaint}"]
