"""The command line: `v4jax <command> [flags]`, one thin function a command.

Flags are absl's, parsed into a private `FlagValues` so that nothing global is touched and `main` can be called from
Python. Only the standard library and absl are imported here: help and mistakes must not wait for jax.
"""

from __future__ import annotations

import ast
import difflib
import errno
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from absl import flags

import v4jax
from v4jax import config as config_lib
from v4jax.core.check import UserError
from v4jax.core.memory import keep_heap


@dataclass(frozen=True)
class Flag:
    """One flag of a command: how absl defines it, and the line `--help` prints."""

    name: str
    help: str
    define: Callable = flags.DEFINE_string
    default: object = None
    options: dict = field(default_factory=dict)  # bounds, enum values, required


@dataclass(frozen=True)
class Command:
    """`run(values, config)`: `values` is the parsed FlagValues, `config` a Config, or None where none was named."""

    run: Callable[[flags.FlagValues, config_lib.Config | None], None]
    summary: str
    example: str
    flags: tuple[Flag, ...]
    has_config: bool = False
    default_config: str | None = None


# --- commands ----------------------------------------------------------------------------------------------------


def _train(values: flags.FlagValues, config: config_lib.Config) -> None:
    from v4jax.train import loop

    loop.train(config, values.workdir or f"runs/{config.name}")


def _generate(values: flags.FlagValues, _: None) -> None:
    prompts = [*values.prompt, *map(_read_prompt, values.prompt_file)]
    if not prompts:
        raise UserError('generate needs something to continue; add --prompt="..." or --prompt_file=FILE')
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
    from v4jax.serve import LLM, SamplingParams

    sampling = SamplingParams(**{name: values[name].value for name in names if values[name].present})
    llm = LLM(values.checkpoint, **_given(values, "dtype", "max_seq_len"))
    _write_streams(llm.stream(prompts, sampling), prompts)


def _convert(values: flags.FlagValues, _: None) -> None:
    from v4jax.checkpoint import convert

    convert.convert(values.source, values.target, **_given(values, "format", "dtype"))


def _bench(values: flags.FlagValues, config: config_lib.Config | None) -> None:
    from v4jax.tools import bench

    bench.run(values.suite, config=config, **_given(values, "checkpoint", "rounds", "json", "plot"))


def _eval(values: flags.FlagValues, _: None) -> None:
    from v4jax import evals

    evals.run(values.suite, values.checkpoint, **_given(values, "json"))


_CHECKPOINT = Flag("checkpoint", "directory of a run, an orbax checkpoint or Hugging Face weights")
_NEEDED_CHECKPOINT = Flag(_CHECKPOINT.name, _CHECKPOINT.help, options={"required": True})
_DTYPE = Flag("dtype", "bfloat16 or float32 (default: as stored)", flags.DEFINE_enum,
              options={"enum_values": ["bfloat16", "float32"]})  # fmt: skip
_JSON = Flag("json", "also write the records to this file")

COMMANDS = {
    "train": Command(
        _train, "train a model, or resume a run that was stopped",
        "v4jax train --config=tiny --workdir=runs/tiny --config.train.steps=200",
        (Flag("workdir", "directory of the run (default: runs/<name of the config>)"),),
        has_config=True, default_config="tiny",
    ),
    "generate": Command(
        _generate, "continue prompts, streaming the text to the terminal",
        'v4jax generate --checkpoint=runs/tiny --prompt="To be, or not" --max_tokens=100',
        (
            _NEEDED_CHECKPOINT,
            Flag("prompt", "text to continue; repeat it for several at once", flags.DEFINE_multi_string, ()),
            Flag("prompt_file", "UTF-8 file holding one prompt; may be repeated", flags.DEFINE_multi_string, ()),
            Flag("max_tokens", "most tokens to add", flags.DEFINE_integer, options={"lower_bound": 1}),
            Flag("max_seq_len", "most tokens, prompt included", flags.DEFINE_integer, options={"lower_bound": 1}),
            Flag("temperature", "0 always takes the likeliest token", flags.DEFINE_float, options={"lower_bound": 0.0}),
            Flag("top_k", "sample among the k likeliest tokens (0: all)", flags.DEFINE_integer,
                 options={"lower_bound": 0}),
            Flag("top_p", "sample among the fewest tokens that hold this probability", flags.DEFINE_float,
                 options={"lower_bound": 0.0, "upper_bound": 1.0}),
            Flag("min_p", "drop tokens below this fraction of the likeliest one's probability", flags.DEFINE_float,
                 options={"lower_bound": 0.0, "upper_bound": 1.0}),
            Flag("seed", "the same seed gives the same text", flags.DEFINE_integer),
            Flag("stop", "end at this string; may be repeated", flags.DEFINE_multi_string, ()),
            _DTYPE,
        ),
    ),
    "convert": Command(
        _convert, "turn Hugging Face weights into a v4jax checkpoint, or back",
        "v4jax convert --source=HF_DIR --target=DIR",
        (
            Flag("source", "directory to read", options={"required": True}),
            Flag("target", "directory to write", options={"required": True}),
            Flag("format", "huggingface or orbax (default: the one that the source is not)", flags.DEFINE_enum,
                 options={"enum_values": ["huggingface", "orbax"]}),
            _DTYPE,
        ),
    ),
    "bench": Command(
        _bench, "measure speed, as ratios taken in one run",
        "v4jax bench --suite=peer --config=small --json=peer.json",
        (
            Flag("suite", "what to measure", options={"required": True}),
            _CHECKPOINT,
            Flag("rounds", "repetitions of every measurement", flags.DEFINE_integer, options={"lower_bound": 1}),
            _JSON,
            Flag("plot", "also draw the records to this PNG file"),
        ),
        has_config=True,
    ),
    "eval": Command(
        _eval, "measure the quality of a checkpoint",
        "v4jax eval --checkpoint=runs/tiny --suite=perplexity",
        (Flag("suite", "what to measure", options={"required": True}), _NEEDED_CHECKPOINT, _JSON),
    ),
}  # fmt: skip


def _given(values: flags.FlagValues, *names: str) -> dict:
    """The flags among `names` that were typed; the callee's own defaults stand for the others."""
    return {name: values[name].value for name in names if values[name].present}


def _read_prompt(path: str) -> str:
    """Text of a prompt file without its last line break."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise UserError(f"cannot read --prompt_file={path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file={path} is not UTF-8 (byte {error.start}); convert it first") from error


def _write_streams(pieces: Iterable[tuple[int, str]], prompts: list[str]) -> None:
    """Print `(prompt index, text)` pieces: the first prompt live, the others whole, after it, each under its prompt."""
    rest = [""] * len(prompts)
    if len(prompts) > 1:
        print(f"==> {prompts[0]}")
    for index, text in pieces:
        if index:
            rest[index] += text
        else:
            print(text, end="", flush=True)
    print()
    for prompt, text in list(zip(prompts, rest, strict=True))[1:]:
        print(f"\n==> {prompt}\n{text}")


# --- help --------------------------------------------------------------------------------------------------------


def _main_help() -> str:
    rows = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([
        v4jax.__doc__, "", "usage: v4jax <command> [flags]", "", *rows, "",
        "v4jax <command> --help lists its flags; --debug shows where an error came from; --version prints "
        f"{v4jax.__version__}.",
    ])  # fmt: skip


def _command_help(name: str, command: Command) -> str:
    rows = []
    if command.has_config:
        default = f" (default: {command.default_config})" if command.default_config else ""
        presets = ", ".join(config_lib.preset_names())
        rows += [("--config=NAME", f"{presets}, or FILE.py[:arg]{default}"),
                 ("--config.FIELD=VALUE", "set one field, such as --config.train.steps=200")]  # fmt: skip
    for flag in command.flags:
        rows.append((f"--{flag.name}=...", flag.help + (" (required)" if flag.options.get("required") else "")))
    lines = [f"  {left:<22}{right}" for left, right in rows]
    return "\n".join([f"v4jax {name}: {command.summary}", "", f"  {command.example}", "", *lines])


# --- parsing -----------------------------------------------------------------------------------------------------


def _parse(name: str, command: Command, argv: list[str]) -> tuple[flags.FlagValues, config_lib.Config | None]:
    """Flags and config of a command; every mistake becomes a UserError of one line."""
    values = flags.FlagValues()
    for flag in command.flags:
        options = {key: value for key, value in flag.options.items() if key != "required"}
        flag.define(flag.name, flag.default, help=flag.help, flag_values=values, **options)
    config_dict = None
    try:
        if command.has_config:
            config_dict, argv = _define_config(command, argv, values)
        extra = values(["v4jax", *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        known = [flag.name for flag in command.flags] + (["config"] if command.has_config else [])
        raise UserError(
            f"{name} has no flag --{error.flagname}{_nearest(error.flagname, known, '--')}; see v4jax {name} --help"
        ) from error
    except flags.IllegalFlagValueError as error:
        raise UserError(_illegal_value(values, str(error))) from error
    except flags.Error as error:
        raise UserError(str(error)) from error
    if extra:
        raise UserError(f"unexpected argument {extra[0]!r}; flags are written --name=value")
    for flag in command.flags:
        if flag.options.get("required") and values[flag.name].value in (None, ""):
            raise UserError(f"{name} needs --{flag.name}: {flag.help}")
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
    base = config_lib.to_dict(config_lib.load(spec))

    rest = _spell_out(base, rest)

    from ml_collections import config_dict, config_flags  # a fifth of a second that help and mistakes do without

    config = config_dict.ConfigDict(base)
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
    return config, rest


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
    """`a,b` and `('a', 'b')` alike."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _unknown_field(path: str, leaves: list[str]) -> str:
    """One line for a field that does not exist, with the nearest one that does."""
    inside = [leaf for leaf in leaves if leaf.startswith(path + ".")]
    if inside:
        return f"config field {path!r} is a group; set a field of it, such as --config.{inside[0]}=..."
    parent, _, last = path.rpartition(".")
    siblings = {leaf.rpartition(".")[2]: leaf for leaf in leaves if leaf.rpartition(".")[0] == parent}
    near = [siblings[key] for key in difflib.get_close_matches(last, siblings, n=1)]
    near = near or [leaf for leaf in leaves if leaf.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(path, leaves, n=1)
    if not near:
        return f"unknown config field {path!r}; groups: {', '.join(sorted({x.partition('.')[0] for x in leaves}))}"
    best = max(near, key=lambda leaf: difflib.SequenceMatcher(None, path, leaf).ratio())
    return f"unknown config field {path!r}; did you mean --config.{best}?"


def _illegal_value(values: flags.FlagValues, message: str) -> str:
    """absl's message, or a plainer one where absl quotes Python's conversion error."""
    python_says = "(invalid literal|could not convert|Non-boolean)"
    match = re.fullmatch(rf"flag --([^=]+)=(.*): .*{python_says}.*", message, re.DOTALL)
    if not match:
        return message
    wanted = values[match[1]].parser.syntactic_help or "true or false"
    return f"--{match[1]}={match[2]} is not {wanted}"


def _nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


# --- entry -------------------------------------------------------------------------------------------------------


def _dispatch(argv: list[str]) -> None:
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name == "--version":
        print(v4jax.__version__)
    elif name in ("--help", "-h", "help"):
        print(_main_help())
    elif name not in COMMANDS:
        raise UserError(f"no command {name!r}{_nearest(name, COMMANDS)}; commands: {', '.join(COMMANDS)}")
    elif {"--help", "-h"} & set(rest):
        print(_command_help(name, COMMANDS[name]))
    else:
        command = COMMANDS[name]
        arguments = _parse(name, command, rest)
        keep_heap()
        command.run(*arguments)
    sys.stdout.flush()  # a reader that went away shows here rather than at exit


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` excludes the program's name.

    A UserError is one line on stderr and code 1 (`--debug` raises it instead); other exceptions are bugs and keep
    their traceback. Ctrl-C gives 130, and a reader that closes the pipe 141, as a shell would report them.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        _dispatch([argument for argument in argv if argument != "--debug"])
    except UserError as error:
        if debug:
            raise
        return _fail(str(error))
    except BrokenPipeError:
        # Python flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(f"no space left to write {error.filename or 'a file'}; free some and run the command again")
    except KeyboardInterrupt:
        print("\nv4jax: interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print("v4jax: " + " ".join(message.split()), file=sys.stderr)
    return 1
