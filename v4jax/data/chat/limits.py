"""Jinja templates of unknown origin within bounds: steps, seconds, output, and the size of every value they build.

The sandbox of jinja2 keeps a template from Python, but not from running forever or from filling the memory. Here every
round of a loop and every macro call counts as a step, and an operation that could build a large value is refused before
it does. What remains is the time of single operations on values within the bounds.
"""

from __future__ import annotations

import datetime
import json
import re
import threading
import time

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from v4jax.core.errors import UserError

_MAX_STEPS = 1_000_000  # rounds of loops and calls of macros in one rendering
_MAX_SECONDS = 10.0  # checked at every step and every output
_MAX_VALUE = 16 << 20  # characters or items of one value, and of the output
_MAX_ITEMS = 1 << 20  # lists, objects and texts inside of one value
_MAX_BUILT = 1 << 30  # characters or items of all values that one rendering builds
_MAX_COUNT = 100_000  # columns, rows or width that an argument may ask for; equals the sandbox's bound of range()
_MAX_POWER = 10_000  # bits of a power or of a factor
_WIDTH = re.compile(r"\d{5,}|%[^%a-zA-Z]*\*")  # a width in a format that pads to more than 9,999 characters
_FILTERS = frozenset(
    "abs attr batch capitalize center count d default dictsort e escape first float forceescape format groupby indent "
    "int items join last length list lower map max min pprint random reject rejectattr replace reverse round safe "
    "select selectattr slice sort string striptags sum title tojson trim truncate unique upper urlencode wordcount "
    "wordwrap xmlattr".split()
)
_COUNTED = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs", "batch", "slice", "wordwrap", "indent"))
_PROGRESS = threading.local()  # of the rendering in this thread: steps, end in seconds, built characters


class LimitError(jinja2.TemplateError):
    """A template exceeds a limit."""


class Program:
    """A compiled template.

    Args:
        source: Jinja source.
        where: the origin of the source, for messages.

    Raises:
        UserError: the source is no template.
    """

    def __init__(self, source: str, where: str):
        self._where = where
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except MemoryError as error:  # Python's parser reports too many parentheses so
            raise UserError(f"{where} is nested too deeply") from error
        except Exception as error:  # jinja2 and Python's compiler raise many kinds of errors for malformed source
            raise UserError(f"{where} is no Jinja template: {_first_line(error)}") from error

    def run(self, variables: dict) -> str:
        """Return the output of the template with these variables.

        Raises:
            UserError: the template raises an exception or exceeds a limit.
        """
        parts, size = [], 0
        _PROGRESS.steps, _PROGRESS.built = 0, 0
        _PROGRESS.end = time.monotonic() + _MAX_SECONDS
        try:
            for part in self._template.generate(variables):
                size += len(part)
                if size > _MAX_VALUE:
                    raise LimitError(f"its output has more than {_MAX_VALUE:,} characters")
                _check_time()
                parts.append(part)
        except MemoryError as error:
            raise UserError(f"{self._where} needs too much memory") from error
        except Exception as error:  # a template can raise whatever the operations of Python raise
            raise UserError(f"{self._where} failed: {_first_line(error)}") from error
        return "".join(parts)


class _Generation(jinja2.ext.Extension):
    """The block {% generation %} of transformers."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Return the statements of a {% generation %} block. The block marks text for training only."""
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body)]


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Environment of transformers with limits. One environment serves several threads."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], finalize=_bounded
        )
        self.filters = {name: self._guarded(name) for name in _FILTERS if name in self.filters}
        self.filters["tojson"] = _tojson
        del self.globals["lipsum"]
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def step(self) -> None:
        """Count a step."""
        _PROGRESS.steps += 1
        if _PROGRESS.steps > _MAX_STEPS:
            raise LimitError(f"it runs for more than {_MAX_STEPS:,} steps")
        if not _PROGRESS.steps % 256:
            _check_time()

    def concat(self, parts) -> str:
        """Return the output of a macro or a {% set %} block, of which `parts` are the pieces."""
        parts = list(parts)
        _build(sum(map(len, parts)))
        return "".join(parts)

    def concat_bounded(self, *values: object) -> str:
        """Return the concatenation `a ~ b`."""
        texts = [str(_bounded(value)) for value in values]
        return self.concat(texts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock))):
            step = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("step"), [], [], None, None)
            node.body.insert(0, jinja2.nodes.ExprStmt(step).set_lineno(node.lineno))
        return _Concats().visit(tree)

    def call_binop(self, context, operator: str, left: object, right: object) -> object:
        """Evaluate a binary operation, unless its result could be too large."""
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MAX_POWER:
                raise LimitError("it computes a number that is too large")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, int) and value.bit_length() > _MAX_POWER:
                    raise LimitError("it computes a number that is too large")
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    _build(len(value) * times)
        elif operator == "+":
            if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                _build(len(left) + len(right))
        elif isinstance(left, str):
            _check_format(left)
            _bounded(right)
        return super().call_binop(context, operator, left, right)

    def call(self, __context, __callable, *args, **kwargs):  # noqa: N805
        """Call a function or method, unless it is a text method whose result could be too large."""
        method = getattr(__callable, "__wrapped__", __callable)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            _check_text_method(owner, name, [*args, *kwargs.values()])
        return super().call(__context, __callable, *args, **kwargs)

    def _guarded(self, name: str):
        """Return the filter `name`, which refuses arguments with which its result could be too large."""
        action = self.filters[name]

        def guarded(*args, **kwargs):
            values = [value for value in [*args, *kwargs.values()] if not _is_jinja(value)]
            for value in values:
                _bounded(value)
            if name == "join":
                _check_text_method(str(values[1]) if len(values) > 1 else "", name, values[:1])
            else:
                _check_text_method(values[0] if isinstance(values[0], str) else "", name, values[1:])
            return action(*args, **kwargs)

        for marker in ("jinja_pass_arg", "__name__"):
            if hasattr(action, marker):
                setattr(guarded, marker, getattr(action, marker))
        return guarded


class _Concats(jinja2.visitor.NodeTransformer):
    """Replaces `a ~ b`, which the sandbox does not intercept, by a call of `concat_bounded`."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Call:  # noqa: N802
        self.generic_visit(node)
        function = jinja2.nodes.EnvironmentAttribute("concat_bounded")
        return jinja2.nodes.Call(function, node.nodes, [], None, None).set_lineno(node.lineno)


class _Dict:
    """The function dict(). A template cannot reach the class dict itself."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without attributes that begin with an underscore, as in transformers."""

    def __init__(*args, **kwargs):  # no parameter is named, so that namespace(self=...) works
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError("a namespace has no attributes that begin with an underscore")


def _build(size: int) -> None:
    """Raise LimitError if a value of `size` characters or items is too large, or one too many in this rendering."""
    if size > _MAX_VALUE:
        raise LimitError(f"it builds a value of more than {_MAX_VALUE:,} characters or items")
    if hasattr(_PROGRESS, "built"):  # absent while a template is compiled
        _PROGRESS.built += max(size, 0)
        if _PROGRESS.built > _MAX_BUILT:
            raise LimitError(f"it builds values of more than {_MAX_BUILT:,} characters or items")


def _check_time() -> None:
    if time.monotonic() > _PROGRESS.end:
        raise LimitError(f"it runs for more than {_MAX_SECONDS:g} seconds")


def _check_format(text: str) -> None:
    if _WIDTH.search(text):
        raise LimitError("it formats a text with a very large width")


def _check_text_method(text: str, name: str, args: list) -> None:
    """Raise LimitError if the method or filter `name` of `text` could return a value that is too large."""
    if name == "replace":
        new = args[1] if len(args) > 1 and isinstance(args[1], str) else ""
        _build(len(text) + (len(text) + 1) * len(new))
    elif name == "join":
        items = args[0] if args and isinstance(args[0], str | list | tuple) else ()
        _build(sum(len(item) if isinstance(item, str) else 1 for item in items) + len(items) * len(text))
    elif name in ("format", "format_map"):
        _check_format(text)
        _check_count(args)
    elif name in _COUNTED:
        _check_count(args)
        width = max(
            (len(arg) if isinstance(arg, str) else arg for arg in args if isinstance(arg, str | int)), default=0
        )
        _build(len(text) + (text.count("\n") + text.count("\t") + 1) * width)


def _check_count(args: list) -> None:
    if any(isinstance(arg, int) and arg > _MAX_COUNT for arg in args):
        raise LimitError(f"it asks for more than {_MAX_COUNT:,} columns or rows")


def _bounded(value: object) -> object:
    """Return `value`. Raise LimitError if it nests more items or characters than a value may have."""
    if isinstance(value, str | int | float) or value is None:
        return value
    items, size, stack = 0, 0, [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            items += len(item)
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            items += len(item)
            stack += item
        if items > _MAX_ITEMS or size > _MAX_VALUE:
            raise LimitError("it builds a value that is too large")
    return value


def _is_jinja(value: object) -> bool:
    return isinstance(value, jinja2.Environment | jinja2.runtime.Context | jinja2.nodes.EvalContext)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The filter tojson of transformers, which escapes no HTML."""
    _bounded(value)
    _check_count([indent])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    _check_format(format)
    return datetime.datetime.now().strftime(format)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
