"""Errors that a user can cause and fix, with messages that are safe to print."""

import difflib
import re
from collections.abc import Iterable

_VALUE = 200  # maximum number of characters of one name or value in a message
_MESSAGE = 1000  # maximum number of characters of a message
# Control characters (including terminal escapes), invisible and bidirectional marks, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
# Parts of a message that an untrusted file can make long: quoted text, a list, a run of characters without spaces.
_VALUES = re.compile(r"(?<![\w'])'[^']*'(?!\w)|(?<![\w\"])\"[^\"]*\"(?!\w)|\[[^\[\]]*\]|\S{201,}")


class UserError(ValueError):
    """An error with a one-line message that tells the problem and the fix.

    The command line prints only the message and exits with status 1. Names and values in a message may come from an
    untrusted file. Therefore the constructor cuts each to 200 characters and the message to about 1,000, and escapes
    characters that control a terminal.
    """

    def __init__(self, message: str):
        text = _VALUES.sub(_cut, printable(message))
        # The fix is at the end of the message, so the middle is cut.
        super().__init__(text if len(text) <= _MESSAGE else f"{text[: _MESSAGE * 2 // 3]} ... {text[-_MESSAGE // 4 :]}")


class ConfigError(UserError):
    """A configuration is invalid. The message is one line that names the field and the cure."""


def printable(text: str) -> str:
    """Return `text` on one line. White space becomes single spaces, control characters become escapes such as \\x1b."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), " ".join(text.split()))


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the word of `known` nearest to a mistyped `word`, or None. cutoff: least similarity, 0 to 1."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return near[0] if near else None


def suggest(word: str, known: Iterable[str], what: str = "options", cutoff: float = 0.6) -> str:
    """Return the hint of a message on an unknown `word`: the nearest known one, or all of them if none is near."""
    near = nearest(word, known, cutoff)
    return f"did you mean {near!r}?" if near else f"{what}: {', '.join(known)}"


def _cut(match: re.Match) -> str:
    text = match[0]
    if len(text) <= _VALUE:
        return text
    end = text[-1] if text[0] in "'\"[" else ""
    return f"{text[: _VALUE - 4]}...{end}"
