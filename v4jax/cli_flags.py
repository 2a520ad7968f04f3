"""Flags of a command: declaration, help and parsing, including typed overrides of a config.

Flags are parsed into a private `FlagValues`, so no global state changes. Until a config is read, only the standard
library and absl are imported, because help and error messages must not wait for jax.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from absl import flags

from v4jax import config as config_lib
from v4jax.core.errors import UserError, nearest
from v4jax.core.paths import local_path


@dataclass(frozen=True)
class Flag:
    """One flag of a command: how absl defines it, and the line `--help` prints."""

    name: str
    help: str
    define: Callable = flags.DEFINE_string
    default: object = None
    options: dict = field(default_factory=dict)  # bounds, enum values, required
    shown: str = ""  # the default that `--help` shows if `default` does not hold it

    @property
    def values(self) -> tuple[str, ...]:
        """All values of an enumeration; () for other flags."""
        return tuple(self.options.get("enum_values", ()))

    @property
    def is_path(self) -> bool:
        """Whether the value is a path of a file or directory."""
        return self.define in (define_path, define_paths)

    @property
    def form(self) -> str:
        """Placeholder of the value in `--help`."""
        if self.values:
            return "|".join(self.values)
        return _FORMS.get(self.define, "...")


@dataclass(frozen=True)
class Command:
    """`run(values, config)`: `values` is the parsed FlagValues, `config` a Config, or None where none was named."""

    run: Callable[[flags.FlagValues, config_lib.Config | None], None]
    summary: str
    example: str
    flags: tuple[Flag, ...]
    has_config: bool = False
    default_config: str | None = None


class _Size(flags.ArgumentParser):
    """Bytes: a whole number, or a number with a unit."""

    syntactic_help = "a number of bytes such as 512MiB, 2GiB or 1.5TB"

    def parse(self, argument: str | int) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", str(argument).strip())
        if match is None or (match[3] and not match[2]):
            raise ValueError(f"{argument!r} is not {self.syntactic_help}")
        return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))


def define_size(name: str, default: int | None, help: str, flag_values: flags.FlagValues, **options) -> None:
    """An absl flag of bytes."""
    flags.DEFINE(_Size(), name, default, help, flag_values, **options)


def define_path(name: str, default: str | None, help: str, flag_values: flags.FlagValues, **options) -> None:
    """An absl flag of one path. `parse` refuses a URL."""
    flags.DEFINE_string(name, default, help, flag_values, **options)


def define_paths(name: str, default: tuple[str, ...], help: str, flag_values: flags.FlagValues, **options) -> None:
    """An absl flag of a path that may be repeated. `parse` refuses URLs."""
    flags.DEFINE_multi_string(name, default, help, flag_values, **options)


def explicit_flags(values: flags.FlagValues, *names: str) -> dict:
    """Return the flags among `names` that the user gave; for the others, the callee's defaults apply."""
    return {name: values[name].value for name in names if values[name].present}


_FORMS = {
    flags.DEFINE_integer: "N",
    flags.DEFINE_multi_integer: "N",
    flags.DEFINE_float: "X",
    flags.DEFINE_bool: "true|false",
    flags.DEFINE_list: "A,B,...",
    define_size: "BYTES",
    define_path: "PATH",
    define_paths: "PATH",
}
SIMILAR = 0.5  # least similarity of a flag or a command that a message suggests
_WIDTH = 30  # columns of a flag in `--help`; a longer one has a line of its own


def command_help(name: str, command: Command) -> str:
    """Return the text of `v4jax name --help`."""
    rows = []
    if command.has_config:
        default = f" (default: {command.default_config})" if command.default_config else ""
        rows += [
            ("--config=NAME", f"a preset (below), or FILE.py[:arg]{default}"),
            ("--config.FIELD=VALUE", "set one field, such as --config.train.steps=200"),
            ("--show_config", f"list every field with its value and end: v4jax {name} --config=NAME --show_config"),
        ]
    rows += [(f"--{flag.name}={flag.form}", _explained(flag)) for flag in command.flags]
    lines = [_row(left, right) for left, right in rows]
    if command.has_config:
        presets = config_lib.preset_summaries()
        lines += ["", "presets:", *(_row(preset, summary) for preset, summary in presets.items())]
    return "\n".join([f"v4jax {name}: {command.summary}", "", f"  {command.example}", "", *lines])


def _row(left: str, right: str) -> str:
    gap = " " * (_WIDTH - len(left)) if len(left) < _WIDTH else "\n" + " " * (_WIDTH + 2)
    return f"  {left}{gap}{right}"


def _explained(flag: Flag) -> str:
    """Help of a flag with its default."""
    if flag.options.get("required"):
        return f"{flag.help} (required)"
    default = flag.shown or ("" if flag.default in (None, ()) else str(flag.default))
    return flag.help + (f" (default: {default})" if default else "")


def config_lines(config: config_lib.Config) -> list[str]:
    """Every field as the argument that sets it to its value, with the comment of the field in `v4jax/config.py`."""
    comments = dict(field_comments(type(config)))
    lines = []
    for path, value in _leaves(config_lib.to_dict(config)):
        argument = shlex.quote(f"--config.{path}={_typed(value)}")
        lines.append(f"{argument:<44}  # {comments[path]}" if path in comments else argument)
    return lines


def config_paths() -> list[str]:
    """Dotted paths of all fields."""
    return [path for path, _ in _leaves(config_lib.to_dict(config_lib.Config()))]


def _typed(value: object) -> str:
    """A value as it is typed after `--config.FIELD=`."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def field_comments(group: type, prefix: str = "") -> Iterable[tuple[str, str]]:
    """(dotted path, comment) of the fields of a config dataclass and of its groups, read from its source."""
    groups = {field.name: field.default_factory for field in dataclasses.fields(group)}
    for line in inspect.getsource(group).splitlines():
        match = re.fullmatch(r"    (\w+): [^#]*?(?:  # (.*))?", line)
        if match is None or match[1] not in groups:
            continue
        if match[2]:
            yield prefix + match[1], match[2]
        if dataclasses.is_dataclass(groups[match[1]]):
            yield from field_comments(groups[match[1]], f"{prefix}{match[1]}.")


def parse(name: str, command: Command, argv: list[str]) -> tuple[flags.FlagValues, config_lib.Config | None]:
    """Flags and config of a command; every mistake becomes a UserError of one line."""
    values = flags.FlagValues()
    for flag in command.flags:
        options = {key: value for key, value in flag.options.items() if key != "required"}
        flag.define(flag.name, flag.default, help=flag.help, flag_values=values, **options)
    config_dict = None
    if command.has_config:
        flags.DEFINE_bool(_SHOW, False, help="list the fields", flag_values=values)
    try:
        if command.has_config:
            config_dict, argv = _define_config(command, argv, values)
        extra = values(["v4jax", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        known = [flag.name for flag in command.flags] + (["config"] if command.has_config else [])
        near = nearest(error.flagname, known, SIMILAR)
        hint = f"; did you mean --{near}?" if near else ""
        raise UserError(f"{name} has no flag --{error.flagname}{hint}; see v4jax {name} --help") from error
    except flags.IllegalFlagValueError as error:
        raise UserError(_illegal_value(values, str(error))) from error
    except flags.Error as error:
        raise UserError(str(error)) from error
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}; flags are written --name=value")
    for flag in command.flags:
        if command.has_config and values[_SHOW].value:
            break  # nothing will run
        if flag.options.get("required") and values[flag.name].value in (None, ""):
            raise UserError(f"{name} needs --{flag.name}: {flag.help}")
    for flag in command.flags:
        if flag.is_path:
            given = values[flag.name].value
            for path in [given] if isinstance(given, str) else given or ():
                local_path(path, f"--{flag.name}")
    if config_dict is None:
        return values, None
    return values, config_lib.validate(config_lib.from_dict(config_lib.Config, config_dict.to_dict()))


def _define_config(command: Command, argv: list[str], values: flags.FlagValues):
    """Take `--config` out of `argv` and define a typed flag for every `--config.field` in it.

    Returns (ConfigDict that parsing will fill, or None without a config; the arguments left to parse).
    """
    spec, rest = command.default_config, []
    arguments = iter(argv)
    for argument in arguments:
        if re.fullmatch(r"--?config(=.*)?", argument):
            spec = argument.partition("=")[2] if "=" in argument else next(arguments, "")
        else:
            rest.append(argument)
    if spec is None:
        if overrides := [argument for argument in rest if _OVERRIDE.fullmatch(argument)]:
            raise UserError(f"{overrides[0]} changes a config, but none is named; add --config=NAME")
        return None, rest
    if not spec:
        raise UserError(f"--config needs a name: {', '.join(config_lib.preset_names())}, or FILE.py")
    if "://" in spec:  # "tiny:/x" is the preset tiny with the argument "/x"
        local_path(spec, "--config")
    base = config_lib.to_dict(config_lib.load(spec))

    rest = _spell_out(base, rest)

    from ml_collections import config_dict, config_flags  # slow to import; help and errors skip it

    config = config_dict.ConfigDict(base)
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
    return config, rest


_SHOW = "show_config"
_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)


def _spell_out(base: dict, argv: list[str]) -> list[str]:
    """Bring every override into the form `--config.field=value`, and check that the field exists.

    The last of several overrides of a field holds. Tuples may be typed as `swa,csa`; config_flags alone would read
    `('swa', 'csa')` only, and join the tuples of repeated overrides.
    """
    leaves = dict(_leaves(base))
    others, overrides = [], {}
    arguments = iter(argv)
    for argument in arguments:
        match = _OVERRIDE.fullmatch(argument)
        if not match:
            others.append(argument)
            continue
        negated, path, value = match.groups()
        if path not in leaves:
            raise UserError(_unknown_field(path, list(leaves)))
        if negated and (value is not None or not isinstance(leaves[path], bool)):
            raise UserError(f"{argument} has no meaning; write --config.{path}=VALUE")
        if value is None and isinstance(leaves[path], bool):
            value = "false" if negated else "true"
        elif value is None and (value := next(arguments, None)) is None:
            raise UserError(f"--config.{path} needs a value, such as --config.{path}={leaves[path]}")
        overrides[path] = repr(_tuple_of(value)) if isinstance(leaves[path], tuple) else value
    return others + [f"--config.{path}={value}" for path, value in overrides.items()]


def _leaves(values: dict, prefix: str = "") -> Iterable[tuple[str, object]]:
    """Every (dotted path, value) of a nested dict."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _tuple_of(text: str) -> tuple:
    """Parse a tuple typed as `a,b` or as `('a', 'b')`."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _unknown_field(path: str, leaves: list[str]) -> str:
    """Return a one-line error for a field that does not exist, with the nearest existing field."""
    inside = [leaf for leaf in leaves if leaf.startswith(path + ".")]
    if inside:
        return f"config field {path!r} is a group; set a field of it, such as --config.{inside[0]}=..."
    parent, _, last = path.rpartition(".")
    siblings = {leaf.rpartition(".")[2]: leaf for leaf in leaves if leaf.rpartition(".")[0] == parent}
    if sibling := nearest(last, siblings):
        best = siblings[sibling]
    else:
        of_that_name = [leaf for leaf in leaves if leaf.rpartition(".")[2] == last]
        best = nearest(path, of_that_name, cutoff=0.0) or nearest(path, leaves)
    if best is None:
        return f"unknown config field {path!r}; groups: {', '.join(sorted({x.partition('.')[0] for x in leaves}))}"
    return f"unknown config field {path!r}; did you mean --config.{best}?"


def _illegal_value(values: flags.FlagValues, message: str) -> str:
    """Return absl's message, or a plainer one if absl quotes Python's conversion error."""
    python_says = "(invalid literal|could not convert|Non-boolean)"
    match = re.fullmatch(rf"flag --([^=]+)=(.*): .*{python_says}.*", message, re.DOTALL)
    if not match:
        return message
    wanted = values[match[1]].parser.syntactic_help or "true or false"
    return f"--{match[1]}={match[2]} is not {wanted}"
