"""The streamed text of a reply to deltas of reasoning, content and tool calls.

A marker may arrive in pieces. Text that can still become a marker is held back, so every way of cutting a reply into
chunks gives the same reasoning, content and calls. Malformed markup never fails. It gives what the official stream
parser (deepseek-recipe 0.2.0) gives: unknown text between tool calls is dropped, an unfinished call keeps its partial
arguments. Two things are better here. A parameter name may contain spaces, and quotes in it are escaped.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import secrets
from collections.abc import Callable, Iterable

from v4jax.data.chat.encoding import DSML, END_THINK, THINK

_OPEN = f"<{DSML}"
_CLOSE = f"</{DSML}"
_ENDS_OF_CALLS = (f"{_CLOSE}tool_calls>", f"{_CLOSE} calls>")  # V4 and V4.1


class DeltaKind(enum.Enum):
    """What a delta continues."""

    REASONING = "reasoning"
    CONTENT = "content"
    TOOL_CALL = "tool_call"  # a new call; the text of the delta is ""
    ARGUMENTS = "arguments"  # a part of the JSON text of the last call


@dataclasses.dataclass(frozen=True)
class Delta:
    """A part of a reply.

    Attributes:
        kind: what the delta continues.
        text: new text.
        index: number of the call, from 0; None for reasoning and content.
        id, name: id and tool name of a new call; None otherwise.
    """

    kind: DeltaKind
    text: str
    index: int | None = None
    id: str | None = None
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class DecodedToolCall:
    """A call of a complete reply. `arguments` is JSON text, unless the reply is cut or malformed."""

    id: str
    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Reply:
    """A complete reply.

    Attributes:
        reasoning_content: reasoning; None if the reply has none.
        content: answer.
        tool_calls: calls in order.
    """

    reasoning_content: str | None
    content: str
    tool_calls: tuple[DecodedToolCall, ...]


class Start(enum.Enum):
    """Where a reply begins, which the end of its prompt determines."""

    REASONING = "reasoning"
    REASONING_CONTINUED = "reasoning_continued"
    CONTENT = "content"
    CONTENT_CONTINUED = "content_continued"
    TOOL_CALLS = "tool_calls"
    OPEN = "open"  # content, unless the reply itself begins with <think>
    PLAIN = "plain"  # text without markup of reasoning, of a model with a chat template of its own


class ReplyDecoder:
    """Decoder of one reply.

    Args:
        start: where the reply begins.
        parse_tool_calls: False leaves the markup of tool calls in the text.
        json_output: the answer is JSON. A space replaces the text and the code fence around it.
        stop: texts that end the reply when they occur in the answer. They are not part of it.
        new_id: function that returns the id of a new call.

    Attributes:
        finished: the reply has ended; later text is ignored.
    """

    def __init__(
        self,
        start: Start = Start.CONTENT,
        *,
        parse_tool_calls: bool = True,
        json_output: bool = False,
        stop: Iterable[str] = (),
        new_id: Callable[[], str] = lambda: f"call_{secrets.token_hex(12)}",
    ):
        self.finished = False
        self._parse_tool_calls = parse_tool_calls
        self._json_output = json_output
        self._stop = tuple(text for text in stop if text)
        self._new_id = new_id
        self._held = ""  # text that can still become a marker
        self._name = ""  # name of a call, as far as it has arrived
        self._calls = 0
        self._deltas: list[Delta] = []
        begin = {
            Start.REASONING: lambda: self._enter_reasoning(leading=True),
            Start.REASONING_CONTINUED: lambda: self._enter_reasoning(leading=False),
            Start.CONTENT: lambda: self._enter_content(leading=True),
            Start.CONTENT_CONTINUED: lambda: self._enter_content(leading=False),
            Start.TOOL_CALLS: self._enter_calls,
            Start.OPEN: lambda: self._enter_content(leading=True, opens=True),
            Start.PLAIN: lambda: self._enter(self._content, self._stop_markers() + self._calls_markers()),
        }
        begin[start]()

    def push(self, text: str) -> list[Delta]:
        """Return the deltas that the next text of the reply completes."""
        if text and not self._held and not self.finished and self._triggers.isdisjoint(text):
            for marker in self._markers:  # no marker can begin in this text
                marker.step(text[0])
            self._put(text)
            return self._take()
        if self.finished:
            return []
        text, begin = self._held + text, 0  # text[begin:] is not put out yet
        for end in range(len(self._held) + 1, len(text) + 1):
            # A list, because every marker must see the character.
            full = [marker for marker in self._markers if marker.step(text[end - 1])]
            if full:
                self._put(text[begin : end - full[0].length])
                begin = end
                full[0].action()
                if self.finished:
                    return self._take()
        held = len(text) - max((marker.length for marker in self._markers), default=0)
        self._put(text[begin:held])
        self._held = text[held:]
        return self._take()

    def finish(self) -> list[Delta]:
        """End the reply. Return the deltas of the text that was held back."""
        if not self.finished:
            self._put(self._held)
        self.finished = True
        self._held = ""
        return self._take()

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _put(self, text: str) -> None:
        if text:
            self._on_text(text)

    def _enter(self, on_text: Callable[[str], None], markers: list[_Marker]) -> None:
        self._on_text = on_text
        self._markers = markers
        self._triggers = frozenset(marker.trigger for marker in markers) | {"\n"}

    def _enter_reasoning(self, leading: bool) -> None:
        markers = self._calls_markers()
        if leading:
            markers.append(_Leading("\n", lambda: self._enter_reasoning(leading=True)))
        markers.append(_Marker(END_THINK, lambda: self._enter_content(leading=True), newlines=True))
        self._enter(self._reasoning, markers)

    def _enter_content(self, leading: bool, opens: bool = False) -> None:
        if self._json_output:
            markers = [_Marker(fence, self._enter_json) for fence in ("```json\n", "```\n")]
            markers += [_Marker(bracket, lambda b=bracket: self._enter_json(b)) for bracket in "{["]
        else:
            markers = self._stop_markers()
        markers += self._calls_markers()
        if leading:
            markers.append(_Leading("\n", lambda: self._enter_content(leading=True, opens=opens)))
        if opens:
            markers.append(_Leading(THINK, lambda: self._enter_reasoning(leading=True)))
        markers.append(_Marker(END_THINK, lambda: self._enter_content(leading=False)))
        self._is_blank = False  # whether a space has replaced the text so far
        self._enter(self._blank if self._json_output else self._content, markers)

    def _enter_json(self, text: str = "") -> None:
        self._put_content(text)
        self._enter(self._content, [*self._stop_markers(), _Marker("\n```", self._enter_after_json)])

    def _enter_after_json(self) -> None:
        self._is_blank = False
        self._enter(self._blank, self._calls_markers())

    def _enter_calls(self) -> None:
        markers = [_Marker('invoke name="', self._enter_name)]
        markers += [_Marker(end, self._end) for end in _ENDS_OF_CALLS]
        self._enter(self._drop, markers)

    def _enter_name(self) -> None:
        self._name = ""
        self._enter(self._extend_name, [_Marker('"', self._start_call)])

    def _start_call(self) -> None:
        self._deltas.append(Delta(DeltaKind.TOOL_CALL, "", self._calls, self._new_id(), self._name))
        self._calls += 1
        self._enter_parameters("{")

    def _enter_parameters(self, separator: str) -> None:
        def begin() -> None:
            self._arguments(f'{separator}"')
            self._enter(self._arguments_string, [_Marker('" ', self._enter_type)])

        def end() -> None:
            self._arguments("{}" if separator == "{" else "}")
            self._enter_calls()

        self._enter(self._drop, [_Marker('parameter name="', begin), _Marker(_CLOSE, end)])

    def _enter_type(self) -> None:
        self._arguments('": ')
        markers = [_Marker('true">', self._enter_string), _Marker('false">', self._enter_json_value)]
        self._enter(self._drop, markers)

    def _enter_string(self) -> None:
        def end() -> None:
            self._arguments('"')
            self._enter_parameters(", ")

        self._arguments('"')
        self._enter(self._arguments_string, [_Marker(_CLOSE, end)])

    def _enter_json_value(self) -> None:
        self._enter(self._arguments, [_Marker(_CLOSE, lambda: self._enter_parameters(", "))])

    def _end(self) -> None:
        self.finished = True

    def _calls_markers(self) -> list[_Marker]:
        return [_Marker(_OPEN, self._enter_calls, newlines=True)] if self._parse_tool_calls else []

    def _stop_markers(self) -> list[_Marker]:
        return [_Marker(text, self._end) for text in self._stop]

    def _reasoning(self, text: str) -> None:
        self._deltas.append(Delta(DeltaKind.REASONING, text))

    def _content(self, text: str) -> None:
        self._deltas.append(Delta(DeltaKind.CONTENT, text))

    def _put_content(self, text: str) -> None:
        if text:
            self._content(text)

    def _blank(self, text: str) -> None:
        if not self._is_blank:
            self._content(" ")
        self._is_blank = True

    def _drop(self, text: str) -> None:
        pass

    def _extend_name(self, text: str) -> None:
        self._name += text

    def _arguments(self, text: str) -> None:
        self._deltas.append(Delta(DeltaKind.ARGUMENTS, text, self._calls - 1))

    def _arguments_string(self, text: str) -> None:
        self._arguments(json.dumps(text, ensure_ascii=False)[1:-1])


def collect(deltas: Iterable[Delta]) -> Reply:
    """Return the complete reply of its deltas."""
    reasoning, content, calls = None, "", []
    for delta in deltas:
        if delta.kind is DeltaKind.REASONING:
            reasoning = (reasoning or "") + delta.text
        elif delta.kind is DeltaKind.CONTENT:
            content += delta.text
        elif delta.kind is DeltaKind.TOOL_CALL:
            calls.append(DecodedToolCall(delta.id, delta.name, ""))
        else:
            calls[-1] = dataclasses.replace(calls[-1], arguments=calls[-1].arguments + delta.text)
    return Reply(reasoning, content, tuple(calls))


class _Marker:
    """Progress of a search for a text in a stream, one character a time (Knuth, Morris, Pratt).

    Args:
        text: text to find.
        action: what follows.
        newlines: newlines directly before the text belong to the marker.

    Attributes:
        length: number of the last characters that can be the beginning of the marker.
        trigger: first character of the text.
    """

    __slots__ = ("action", "length", "trigger", "_text", "_borders", "_matched", "_newlines", "_counts")

    def __init__(self, text: str, action: Callable[[], None], *, newlines: bool = False):
        self.action = action
        self.length = 0
        self.trigger = text[0]
        self._text = text
        self._borders = _borders(text)
        self._matched = 0
        self._newlines = 0
        self._counts = newlines

    def step(self, char: str) -> bool:
        """Read the next character. Return whether it completes the marker."""
        if self._counts and not self._matched and char == "\n":
            self._newlines += 1
        else:
            before = self._matched
            while self._matched and self._text[self._matched] != char:
                self._matched = self._borders[self._matched - 1]
            self._matched += self._text[self._matched] == char
            if self._matched <= before:
                self._newlines = 0
        self.length = self._newlines + self._matched
        return self._matched == len(self._text)


class _Leading(_Marker):
    """A marker that only the next characters can complete."""

    __slots__ = ("_is_possible",)

    def __init__(self, text: str, action: Callable[[], None]):
        super().__init__(text, action)
        self._is_possible = True

    def step(self, char: str) -> bool:
        """Read the next character. Return whether all characters so far are the marker."""
        self._is_possible = self._is_possible and self._text[self.length] == char
        self.length = self.length + 1 if self._is_possible else 0
        return self.length == len(self._text)


def _borders(text: str) -> list[int]:
    """Return the length of the longest proper prefix that is a suffix, of every prefix of `text`."""
    borders = [0]
    for char in text[1:]:
        length = borders[-1]
        while length and text[length] != char:
            length = borders[length - 1]
        borders.append(length + (text[length] == char))
    return borders
