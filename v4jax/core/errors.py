"""Errors that a user can cause and cure, in text that is safe to print."""

import re

_VALUE = 200  # most characters of one name or value inside a message
_MESSAGE = 1000  # most characters of a whole message
# Control characters (terminal escapes among them), invisible and bidirectional marks, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
# What a file of unknown origin can make long: quoted text, a list, a run without spaces.
_VALUES = re.compile(r"(?<![\w'])'[^']*'(?!\w)|(?<![\w\"])\"[^\"]*\"(?!\w)|\[[^\[\]]*\]|\S{201,}")


class UserError(ValueError):
    """One clear line: what is wrong and what to do. The command line prints it alone and exits with 1.

    The message is made safe here, because names and values in it may come from a file of unknown origin: each is cut to
    200 characters, the whole to 1,000, and characters that steer a terminal are shown as escapes.
    """

    def __init__(self, message: str):
        text = _VALUES.sub(_cut, printable(message))
        # The cure stands at the end, so the middle goes.
        super().__init__(text if len(text) <= _MESSAGE else f"{text[: _MESSAGE * 2 // 3]} ... {text[-_MESSAGE // 4 :]}")


def printable(text: str) -> str:
    """`text` on one line, with white space as single spaces and control characters as escapes such as \\x1b."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), " ".join(text.split()))


def _cut(match: re.Match) -> str:
    text = match[0]
    if len(text) <= _VALUE:
        return text
    end = text[-1] if text[0] in "'\"[" else ""
    return f"{text[: _VALUE - 4]}...{end}"
