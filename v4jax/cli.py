"""The command line: `v4jax <command> [flags]`, one thin function a command.

A command is a function of this module and a row of `COMMANDS` with its flags, which `cli_flags.py` parses. A command
imports its packages when it runs, because help and error messages must not wait for jax. `main` changes no global
flags, so it can be called from Python.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import sys
from collections.abc import Iterator

from absl import flags

import v4jax
from v4jax import cli_completion
from v4jax import config as config_lib
from v4jax.cli_flags import (
    SIMILAR,
    Command,
    Flag,
    command_help,
    config_lines,
    define_path,
    define_paths,
    explicit_flags,
    parse,
)
from v4jax.cli_generate import decode_flag, read_prompts, token_ids, write_streams
from v4jax.cli_serve import SETTINGS_FLAGS
from v4jax.core import compilation_cache
from v4jax.core.errors import UserError, printable, suggest
from v4jax.core.malloc import tune_malloc
from v4jax.core.spinner import spinner
from v4jax.core.timing import GenerationTimer
from v4jax.engine_flags import CACHE_FLAGS, SAMPLING_FLAGS, SERVE_FLAGS, STORED
from v4jax.evals import SUITES as EVALS
from v4jax.tools import bench

# --- commands ----------------------------------------------------------------------------------------------------


def _train(values: flags.FlagValues, config: config_lib.Config) -> None:
    from v4jax.train.stop_signals import StopSignals

    with StopSignals(exits=True) as stop:  # before jax is imported, which takes seconds
        from v4jax.parallel import distributed

        compilation_cache.enable(values.compilation_cache)
        distributed.initialize(_place(values), values.join_timeout)
        from v4jax.train import loop

        loop.train(config, values.workdir or f"runs/{config.name}", stop)


def _place(values: flags.FlagValues):
    """Return the ProcessInfo of this process in a multi-process run, from flags or the launcher's environment."""
    from v4jax.parallel.distributed import ProcessInfo, detect_process

    if values.coordinator is None:
        return detect_process(os.environ)
    if values.num_processes is None or values.process_id is None:
        raise UserError("--coordinator needs --num_processes and --process_id, the number of this one from 0")
    if not 0 <= values.process_id < values.num_processes:
        raise UserError(f"--process_id={values.process_id} must lie in 0..{values.num_processes - 1}")
    devices = tuple(map(int, values.local_devices)) if values.local_devices else None
    return ProcessInfo("flags", values.coordinator, values.num_processes, values.process_id, devices)


def _generate(values: flags.FlagValues, _: None) -> None:
    texts, ids = ("stop", "bad_words"), ("stop_token_ids", "allowed_token_ids")
    typed = explicit_flags(values, *(flag.name for flag in SAMPLING_FLAGS if flag.name not in (*texts, *ids)))
    typed |= {name: [decode_flag(name, text) for text in values[name].value] for name in texts if values[name].value}
    typed |= {name: token_ids(values, name) for name in explicit_flags(values, *ids)}
    options = _llm_options(values)
    prompts = read_prompts(values)
    from v4jax.parallel import distributed
    from v4jax.serve import LLM, SamplingParams

    compilation_cache.enable(values.compilation_cache)
    SamplingParams(**typed)  # mistakes come before minutes of loading
    options |= _mesh(values)
    shows = distributed.is_primary()  # every process runs the same steps, and the first one prints
    with distributed.peer_errors(), contextlib.ExitStack() as opened:
        with spinner(f"loading {values.checkpoint}", shows):
            llm = opened.enter_context(LLM(values.checkpoint, **options))
        timer = opened.enter_context(GenerationTimer())
        if llm.cache_summary and shows:
            print(f"cache: {llm.cache_summary}", file=sys.stderr)
        pieces = timer.watch(llm.stream(prompts, SamplingParams(**{**llm.default_sampling_params, **typed})))
        write_streams(pieces, prompts, shows)
        stats = llm.stats()
        if shows:
            print(timer.summary(stats["prompt_tokens"], stats["generation_tokens"]), file=sys.stderr)


def _serve(values: flags.FlagValues, _: None) -> None:
    try:
        from v4jax.serve.openai.server import serve
    except ImportError as error:
        raise UserError(f"serve needs {error.name}; run pip install 'v4jax[serve]'") from error
    from v4jax.serve.openai.service import load

    compilation_cache.enable(values.compilation_cache)
    settings = explicit_flags(values, *(flag.name for flag in SETTINGS_FLAGS))
    mesh = {"mesh": config_lib.Mesh(values.mesh)} if values.mesh else {}
    with load(values.checkpoint, settings, _llm_options(values) | mesh) as service:
        serve(service)


def _llm_options(values: flags.FlagValues) -> dict:
    """Return the arguments of `LLM` that the user gave, but the mesh."""
    options = explicit_flags(values, "tokenizer", "dtype", "bos_id", "parse_special_tokens")
    options |= explicit_flags(values, *SERVE_FLAGS, *CACHE_FLAGS)
    return options | {name: token_ids(values, name) for name in explicit_flags(values, "eos_id")}


def _mesh(values: flags.FlagValues) -> dict[str, config_lib.Mesh]:
    """Join the processes and return the option `mesh` if the flags ask for a mesh, else no option."""
    if not values.mesh:
        if values.coordinator:
            raise UserError("several processes generate on one mesh; add --mesh=serve, or drop --coordinator")
        return {}
    from v4jax.parallel import distributed

    distributed.initialize(_place(values), values.join_timeout)
    return {"mesh": config_lib.Mesh(values.mesh)}


def _convert(values: flags.FlagValues, _: None) -> None:
    from v4jax.checkpoint import convert

    options = explicit_flags(values, "format", "dtype", "overwrite", "verify")
    print(convert.convert(values.source, values.target, **options, progress=True))
    print(f"next: v4jax generate --checkpoint={values.target} --prompt=...")


def _plan(values: flags.FlagValues, config: config_lib.Config) -> None:
    from v4jax.tools import plan

    if explicit_flags(values, "kv_device_entries"):
        config = dataclasses.replace(
            config, cache=dataclasses.replace(config.cache, kv_device_entries=values.kv_device_entries)
        )
    options = ("mode", "context", "concurrency", "analytic", "stage", "json")
    records = plan.run(config, values.topology, **explicit_flags(values, *options))
    if not plan.fits_anywhere(records, config):
        sys.stdout.flush()
        raise SystemExit(plan.DOES_NOT_FIT)


def _bench(values: flags.FlagValues, config: config_lib.Config | None) -> None:
    bench.run(values.suite, config=config, **explicit_flags(values, "checkpoint", "rounds", "contexts", "json", "plot"))


def _eval(values: flags.FlagValues, _: None) -> None:
    from v4jax import evals

    compilation_cache.enable(values.compilation_cache)
    options = (
        "json",
        "data",
        "heldout",
        "kv_cache_dtype",
        "context",
        "windows",
        "contexts",
        "depths",
        "trials",
        "bounds",
    )
    evals.run(values.suite, values.checkpoint, **explicit_flags(values, *options))


_CHECKPOINT = Flag("checkpoint", "directory of a run, an orbax checkpoint or Hugging Face weights", define_path)
_NEEDED_CHECKPOINT = dataclasses.replace(_CHECKPOINT, options={"required": True})
_DTYPE = Flag(
    "dtype",
    "type of the weights",
    flags.DEFINE_enum,
    options={"enum_values": ["bfloat16", "float32"]},
    shown="as stored",
)
_COMPILATION_CACHE = Flag(
    "compilation_cache",
    "directory of compiled programs for the next run, or off",
    define_path,
    shown="$JAX_COMPILATION_CACHE_DIR, else ~/.cache/v4jax/jax; off from jaxlib 0.12 on",
)
_PROCESS_FLAGS = (
    Flag("coordinator", "HOST:PORT of process 0, where no launcher tells it"),
    Flag("num_processes", "processes of the run", flags.DEFINE_integer, options={"lower_bound": 1}),
    Flag("process_id", "number of this process", flags.DEFINE_integer, options={"lower_bound": 0}),
    Flag("local_devices", "GPUs of this process, such as 0,1", flags.DEFINE_list, shown="all it sees"),
    Flag("join_timeout", "seconds to wait for all processes", flags.DEFINE_integer, 300, options={"lower_bound": 1}),
)
_LLM_FLAGS = (
    Flag("tokenizer", "tokenizer.json", define_path, shown=STORED),
    Flag(
        "bos_id",
        "token id before each prompt",
        flags.DEFINE_integer,
        options={"lower_bound": 0},
        shown="the tokenizer's",
    ),
    Flag(
        "eos_id",
        "token ids that end a text, such as 1,5",
        flags.DEFINE_list,
        shown="as the checkpoint's files say",
    ),
    Flag("parse_special_tokens", "read <eos> in a prompt as that token, not as text", flags.DEFINE_bool, False),
    _DTYPE,
    *SERVE_FLAGS.values(),
    *CACHE_FLAGS.values(),
    Flag("mesh", "sharding rules over all devices: serve (experts split)", shown="one device"),
)
_JSON = Flag("json", "also write the records to this file", define_path)

COMMANDS = {
    "train": Command(
        _train,
        "train a model, or resume a run that was stopped",
        "v4jax train --config=tiny --workdir=runs/tiny --config.train.steps=200",
        (
            Flag("workdir", "directory of the run", define_path, shown="runs/<name of the config>"),
            _COMPILATION_CACHE,
            *_PROCESS_FLAGS,
        ),
        has_config=True,
        default_config="tiny",
    ),
    "generate": Command(
        _generate,
        "continue prompts, streaming the text to the terminal",
        'v4jax generate --checkpoint=runs/tiny --prompt="To be, or not" --max_tokens=100',
        (
            _NEEDED_CHECKPOINT,
            Flag(
                "prompt",
                'text to continue, "" to begin a document, - to read it from stdin; may be repeated',
                flags.DEFINE_multi_string,
                (),
            ),
            Flag(
                "prompt_file",
                "UTF-8 file holding one prompt, or - for stdin; may be repeated",
                define_paths,
                (),
            ),
            *SAMPLING_FLAGS,
            *_LLM_FLAGS,
            _COMPILATION_CACHE,
            *_PROCESS_FLAGS,
        ),
    ),
    "serve": Command(
        _serve,
        "serve a checkpoint over HTTP, with the APIs of OpenAI and Anthropic",
        "v4jax serve --checkpoint=runs/tiny --port=8000",
        (_NEEDED_CHECKPOINT, *SETTINGS_FLAGS, *_LLM_FLAGS, _COMPILATION_CACHE),
    ),
    "convert": Command(
        _convert,
        "turn Hugging Face weights into a v4jax checkpoint, or back",
        "v4jax convert --source=HF_DIR --target=DIR",
        (
            Flag("source", "directory to read", define_path, options={"required": True}),
            Flag("target", "directory to write", define_path, options={"required": True}),
            Flag(
                "format",
                "format to write",
                flags.DEFINE_enum,
                options={"enum_values": ["huggingface", "orbax"]},
                shown="the one that the source is not",
            ),
            _DTYPE,
            Flag(
                "overwrite", "replace an earlier result in the target, and keep nothing of it", flags.DEFINE_bool, False
            ),
            Flag(
                "verify",
                "compare the source with its checksums; --noverify takes a damaged one as it is",
                flags.DEFINE_bool,
                True,
            ),
        ),
    ),
    "plan": Command(
        _plan,
        "what a model needs on a topology, before a machine is rented",
        "v4jax plan --config=v4_1t --topology=v5p:8x8x8 --mode=train --analytic",
        (
            Flag(
                "topology",
                "chip and shape: v5p:8x8x8, v5e:16x16x4slices, h100:64, or a TPU's accelerator type: "
                "v5p-512; --analytic compares several",
                options={"required": True},
            ),
            Flag(
                "mode",
                "program to plan for",
                flags.DEFINE_enum,
                "train",
                options={"enum_values": ["train", "prefill", "decode"]},
            ),
            Flag("context", "tokens of a row", flags.DEFINE_integer, options={"lower_bound": 1}, shown="the config's"),
            Flag(
                "concurrency", "rows of a step", flags.DEFINE_integer, options={"lower_bound": 1}, shown="the config's"
            ),
            Flag(
                "analytic",
                "the closed form alone, in a second; else TPU programs are compiled",
                flags.DEFINE_bool,
                False,
            ),
            Flag(
                "stage",
                "how far: program, or buffers: until all bytes are placed, without machine code",
                flags.DEFINE_enum,
                "program",
                options={"enum_values": ["program", "buffers"]},
            ),
            dataclasses.replace(CACHE_FLAGS["kv_device_entries"], shown="the config's"),
            _JSON,
        ),
        has_config=True,
        default_config="tiny",
    ),
    "bench": Command(
        _bench,
        "measure speed, as ratios taken in one run",
        "v4jax bench --suite=vs_transformers --config=small --json=vs_transformers.json",
        (
            Flag("suite", "suite to run", flags.DEFINE_enum, options={"required": True, "enum_values": bench.SUITES}),
            _CHECKPOINT,
            Flag(
                "rounds",
                "repetitions of every measurement",
                flags.DEFINE_integer,
                options={"lower_bound": 1},
                shown="5",
            ),
            Flag(
                "contexts",
                f"tokens of context, such as 1024,65536 (suites {', '.join(bench.suites_with('contexts'))})",
                flags.DEFINE_list,
            ),
            _JSON,
            Flag(
                "plot",
                f"also draw the records to this PNG file (suites {', '.join(bench.suites_with('plot'))})",
                define_path,
            ),
        ),
        has_config=True,
    ),
    "eval": Command(
        _eval,
        "measure the quality of a checkpoint",
        "v4jax eval --checkpoint=runs/tiny --suite=perplexity",
        (
            Flag(
                "suite",
                "perplexity, kv_quant (what a quantized cache costs) or needle (retrieval, by both caches)",
                flags.DEFINE_enum,
                options={"required": True, "enum_values": EVALS},
            ),
            _NEEDED_CHECKPOINT,
            _COMPILATION_CACHE,
            _JSON,
            Flag("data", "perplexity, kv_quant: text files, where the checkpoint was trained on files", define_path),
            Flag("heldout", "perplexity, kv_quant: files of held-out text", define_path),
            Flag("kv_cache_dtype", "kv_quant, needle: format of the cache, fp8 or fp8_fp4"),
            Flag("context", "kv_quant: tokens of a window", flags.DEFINE_integer, options={"lower_bound": 2}),
            Flag("windows", "kv_quant: how many windows", flags.DEFINE_integer, options={"lower_bound": 1}),
            Flag("contexts", "needle: tokens of haystack, such as 1024,65536", flags.DEFINE_list),
            Flag("depths", "needle: depths in a haystack", flags.DEFINE_integer, options={"lower_bound": 1}),
            Flag("trials", "needle: questions a context and depth", flags.DEFINE_integer, options={"lower_bound": 1}),
            Flag("bounds", "kv_quant, needle: other bounds, such as kl_mean=1e-3,top1=0.98 or accuracy=0.9"),
        ),
    ),
}


# --- entry -------------------------------------------------------------------------------------------------------


def _main_help() -> str:
    rows = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            v4jax.__doc__,
            "",
            "usage: v4jax <command> [flags]",
            "",
            *rows,
            "",
            "v4jax <command> --help lists its flags, their defaults and the presets; v4jax train --config=NAME "
            "--show_config lists",
            "the fields of a config; v4jax completion bash|zsh prints a completion script; --debug shows where an "
            "error came from;",
            f"--version prints {v4jax.__version__}.",
        ]
    )


def _dispatch(argv: list[str]) -> None:
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name == "--version":
        print(v4jax.__version__)
    elif name in ("--help", "-h", "help"):
        print(_main_help())
    elif name == "completion":
        print(cli_completion.script(COMMANDS, rest), end="")
    elif name not in COMMANDS:
        raise UserError(f"no command {name!r}; {suggest(name, COMMANDS, 'commands', SIMILAR)}")
    elif {"--help", "-h"} & set(rest):
        print(command_help(name, COMMANDS[name]))
    else:
        command = COMMANDS[name]
        values, config = parse(name, command, rest)
        if command.has_config and values.show_config:
            print("\n".join(config_lines(config)))
            return
        tune_malloc()
        command.run(values, config)
    sys.stdout.flush()  # a reader that went away shows here rather than at exit


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` excludes the program's name.

    A UserError is one line on stderr and code 1 (`--debug` raises it instead); other exceptions are bugs and keep
    their traceback. `plan` exits with 3 where the model does not fit. Ctrl-C gives 130, and a reader that closes the
    pipe 141, as a shell would report them.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        with _replacing_stdout():
            _dispatch([argument for argument in argv if argument != "--debug"])
    except UserError as error:
        if debug:
            raise
        return _fail(str(error))
    except SystemExit as stop:
        return stop.code
    except BrokenPipeError:
        # Python flushes stdout once more at exit, so redirect it to the null device.
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


@contextlib.contextmanager
def _replacing_stdout() -> Iterator[None]:
    """Print "?" for characters that stdout's encoding lacks, inside the context; stderr escapes them anyway."""
    stdout = sys.stdout
    errors = getattr(stdout, "errors", None)
    if not hasattr(stdout, "reconfigure") or errors not in ("strict", "surrogateescape"):
        yield
        return
    stdout.reconfigure(errors="replace")
    try:
        yield
    finally:
        stdout.reconfigure(errors=errors)


def _fail(message: str) -> int:
    print("v4jax: " + printable(message), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
