"""The command line: what reaches the commands, and that every mistake is one line and exit code 1."""

import contextlib
import io
import pathlib
import re
import shlex
import subprocess
import sys
import types

import pytest

import v4jax
from v4jax import cli, cli_generate
from v4jax.cli_flags import parse
from v4jax.config import load, preset_names
from v4jax.core import compilation_cache
from v4jax.core.errors import UserError
from v4jax.models.param_count import count_parameters
from v4jax.train import stop_signals

CONFIG = """
from v4jax.config import Config, Model, MoE


def get_config(arg=""):
    model = Model(layer_types=("swa", "csa", "hca"), moe=MoE(num_hash_layers=1))
    return Config(name=arg or "mine", model=model)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for what the commands call; the list holds (name, positional, keyword) of every call."""
    made = []

    def record(name, result=None):
        return lambda *args, **kwargs: made.append((name, args, kwargs)) or result

    def module(name, **content):
        fake = types.ModuleType(name)
        vars(fake).update(content)
        monkeypatch.setitem(sys.modules, name, fake)
        parent, _, last = name.rpartition(".")
        monkeypatch.setattr(sys.modules[parent], last, fake, raising=False)

    class Engine(contextlib.nullcontext):
        cache_summary = "much"
        default_sampling_params = {"temperature": 0.6, "top_k": 5}

        def __enter__(self):
            return self

        def __init__(self, *args, **kwargs):
            made.append(("LLM", args, kwargs))

        def stream(self, prompts, sampling):
            made.append(("stream", (prompts,), sampling))
            yield 0, "one"
            yield from ((index, f"piece {index} ") for index in range(1, len(prompts)))
            yield 0, " two"
            yield from ((index, "end") for index in range(1, len(prompts)))

        def stats(self):
            return {"prompt_tokens": 1234, "generation_tokens": 5}

    for package in ("train", "serve", "checkpoint", "tools", "evals"):
        module(f"v4jax.{package}")
    module("v4jax.train.loop", train=record("train"))
    module("v4jax.train.stop_signals", StopSignals=stop_signals.StopSignals)
    module("v4jax.serve", LLM=Engine, SamplingParams=lambda **kwargs: kwargs)
    module("v4jax.checkpoint.convert", convert=record("convert", "wrote B"))
    monkeypatch.setattr(cli.bench, "run", record("bench"))
    module("v4jax.evals", run=record("eval"))
    return made


def one_line(capsys, argv: list[str]) -> str:
    """Run a command that must fail; its one line on stderr."""
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n") and captured.err.count("\n") == 1
    return captured.err


# --- what reaches the commands -----------------------------------------------------------------------------------


def test_train_gets_typed_overrides(calls, config):
    argv = [
        "train",
        f"--config={config}:night",
        "--workdir=runs/x",
        "--config.train.steps=7",
        "--config.train.lr",
        "1",
        "--config.model.kv_qdq=true",
        "--noconfig.model.kv_qdq",
        "--config.data.source=a, b.txt",
    ]
    assert cli.main(argv) == 0
    [(name, (got, workdir, _), _)] = calls
    assert (name, workdir, got.name) == ("train", "runs/x", "night")
    assert got.train.steps == 7 and type(got.train.steps) is int
    assert got.train.lr == 1.0 and type(got.train.lr) is float
    assert got.model.kv_qdq is False and got.data.source == "a, b.txt"


@pytest.mark.parametrize("text", ["hca,swa", "('hca', 'swa')", "['hca', 'swa']", "hca, swa"])
def test_tuples_are_overridden_whole(calls, config, text):
    overrides = ["--config.model.layer_types=csa", f"--config.model.layer_types={text}"]  # the last one holds
    assert cli.main(["train", "--config", config, *overrides]) == 0
    assert calls[0][1][0].model.layer_types == ("hca", "swa")


def test_workdir_defaults_to_the_name_of_the_config(calls, config):
    assert cli.main(["train", f"--config={config}"]) == 0
    assert calls[0][1][1] == "runs/mine"


def test_generate_passes_only_what_was_typed_and_streams(calls, capsys):
    argv = ["--checkpoint=DIR", "--prompt=a, b", "--temperature=0", "--stop=x", "--stop=y", "--dtype=float32"]
    assert cli.main(["generate", *argv]) == 0
    assert calls == [
        ("LLM", ("DIR",), {"dtype": "float32"}),
        ("stream", (["a, b"],), {"temperature": 0.0, "top_k": 5, "stop": ["x", "y"]}),
    ]
    assert capsys.readouterr().out == "one two\n"


def test_generate_takes_what_begins_and_ends_a_text(calls):
    argv = ["--prompt=a", "--bos_id=3", "--eos_id=1, 5", "--parse_special_tokens", "--stop_token_ids=7", "--ignore_eos"]
    assert cli.main(["generate", "--checkpoint=DIR", *argv]) == 0
    assert calls[0][2] == {"bos_id": 3, "eos_id": [1, 5], "parse_special_tokens": True}
    assert calls[1][2] == {"temperature": 0.6, "top_k": 5, "stop_token_ids": [7], "ignore_eos": True}


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_prompts_are_bytes_and_characters_that_cannot_be_shown_are_replaced(calls, monkeypatch, encoding):
    """As a terminal of that encoding would, with the stand-ins that Python gives bytes that it cannot decode."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", shown)
    typed = "né\u2192".encode().decode("ascii", "surrogateescape")
    assert cli.main(["generate", "--checkpoint=DIR", f"--prompt={typed}", "--prompt=b"]) == 0
    assert calls[1][1] == (["né\u2192", "b"],)
    shown.flush()
    assert shown.buffer.getvalue().decode(encoding).startswith("==> n??\n" if encoding == "ascii" else "==> né\u2192\n")
    assert shown.errors == "strict"


def test_generate_keeps_several_prompts_apart(calls, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffb\nc\n", encoding="utf-8")  # the mark of editors that put one
    assert cli.main(["generate", "--checkpoint=DIR", "--prompt=a", f"--prompt_file={tmp_path / 'p.txt'}"]) == 0
    assert calls[1][1] == (["a", "b\nc"],)
    assert capsys.readouterr().out == "==> a\none two\n\n==> b\nc\npiece 1 end\n"


def test_generate_gives_the_cache_the_room_that_was_typed(calls, capsys):
    argv = [
        "--kv_cache_memory_bytes=1.5GiB",
        "--kv_host_bytes=512 MB",
        "--kv_disk_bytes=1TiB",
        "--kv_dir=kv",
        "--kv_eviction_policy=lru",
    ]
    assert cli.main(["generate", "--checkpoint=DIR", "--prompt=a", *argv]) == 0
    options = {"kv_cache_memory_bytes": 3 << 29, "kv_host_bytes": 512_000_000, "kv_disk_bytes": 1 << 40}
    assert calls[0] == ("LLM", ("DIR",), options | {"kv_dir": "kv", "kv_eviction_policy": "lru"})
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["loading DIR", "cache: much", "compiling and prefilling"]
    assert re.fullmatch(r"1,234 prompt tokens, 5 generated; TTFT 0\.0\d s; then [\d,.]+ tokens/s", lines[3])


def test_generate_spins_while_it_loads_and_until_the_first_piece(calls, monkeypatch):
    @contextlib.contextmanager
    def spinner(text, show):
        calls.append(("begin", text, show))
        yield
        calls.append(("end", text, show))

    monkeypatch.setattr(cli, "spinner", spinner)
    monkeypatch.setattr(cli_generate, "spinner", spinner)
    assert cli.main(["generate", "--checkpoint=DIR", "--prompt=a"]) == 0
    loading, compiling = "loading DIR", "compiling and prefilling"
    assert [call[:2] if call[0] in ("begin", "end") else call[0] for call in calls] == [
        ("begin", loading),
        "LLM",
        ("end", loading),
        ("begin", compiling),
        "stream",
        ("end", compiling),
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--config=tiny"],
        ["generate", "--checkpoint=DIR", "--prompt=a"],
        ["eval", "--suite=perplexity", "--checkpoint=DIR"],
    ],
    ids=lambda argv: argv[0],
)
def test_every_command_that_compiles_uses_the_compilation_cache(calls, monkeypatch, argv):
    monkeypatch.setattr(compilation_cache, "enable", lambda choice: calls.append(("enable", choice)))
    for flags, choice in ([], None), (["--compilation_cache=off"], "off"), (["--compilation_cache=c"], "c"):
        calls.clear()
        assert cli.main([*argv, *flags]) == 0
        assert calls[0] == ("enable", choice) and len(calls) > 1  # before anything is compiled


@pytest.mark.parametrize(
    "argv, prompts",
    [
        (["--prompt=-"], ["from\nstdin"]),
        (["--prompt_file=-", "--prompt=a"], ["a", "from\nstdin"]),
        (["--prompt="], [""]),
    ],
)
def test_prompts_come_from_stdin_and_may_be_empty(calls, monkeypatch, argv, prompts):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from\r\nstdin\n")))
    assert cli.main(["generate", "--checkpoint=DIR", *argv]) == 0
    assert calls[1][1] == (prompts,)


def test_every_option_of_the_engine_reaches_it(calls):
    argv = [
        "--num_speculative_tokens=2",
        "--batch_invariant",
        "--tokenizer=t.json",
        "--kv_cache_dtype=bf16",
        "--block_size=512",
        "--noenable_prefix_caching",
        "--num_state_snapshots=3",
        "--kv_load_timeout_s=2",
        "--stop_token_ids=7",
        "--ignore_eos",
    ]
    assert cli.main(["generate", "--checkpoint=DIR", "--prompt=a", *argv]) == 0
    options = {"num_speculative_tokens": 2, "batch_invariant": True, "tokenizer": "t.json", "kv_cache_dtype": "bf16"}
    options |= {"block_size": 512, "enable_prefix_caching": False, "num_state_snapshots": 3, "kv_load_timeout_s": 2.0}
    assert calls[0] == ("LLM", ("DIR",), options)
    assert calls[1][2].items() >= {"stop_token_ids": [7], "ignore_eos": True}.items()


def test_convert_bench_eval_arguments(calls, config, capsys):
    assert cli.main(["convert", "--source=A", "--target=B", "--format=orbax", "--overwrite"]) == 0
    assert capsys.readouterr().out == "wrote B\nnext: v4jax generate --checkpoint=B --prompt=...\n"
    assert cli.main(["bench", "--suite=vs_transformers", "--rounds=3", "--json=x.json"]) == 0
    assert cli.main(["bench", "--suite=vs_transformers", f"--config={config}", "--config.train.steps=3"]) == 0
    assert cli.main(["eval", "--suite=perplexity", "--checkpoint=DIR"]) == 0
    assert calls[0] == ("convert", ("A", "B"), {"format": "orbax", "overwrite": True, "progress": True})
    assert calls[1] == ("bench", ("vs_transformers",), {"config": None, "rounds": 3, "json": "x.json"})
    assert calls[2][2]["config"].train.steps == 3
    assert calls[3] == ("eval", ("perplexity", "DIR"), {})


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trian"], "did you mean 'train'?"),
        (["frobnicate"], "commands: train, generate"),
        (["generate", "--promt=x"], "did you mean --prompt?"),
        (["generate", "--prompt=x"], "needs --checkpoint"),
        (["generate", "--kv_host_bytes=lots"], "'lots' is not a number of bytes such as 512MiB"),
        (["generate", "--kv_host_bytes=5iB"], "'5iB' is not a number of bytes"),
        (["generate", "--checkpoint="], "needs --checkpoint"),
        (["generate", "--checkpoint=x"], "--prompt="),
        (["generate", "--checkpoint=x", "--prompt=-", "--prompt_file=-"], "stdin holds one prompt"),
        (["generate", "--checkpoint=x", "words"], "unexpected argument 'words'"),
        (["generate", "--checkpoint=x", "--prompt"], "Missing value for flag --prompt"),
        (["generate", "--checkpoint=x", "--max_tokens=1.5"], "--max_tokens=1.5 is not a positive integer"),
        (["generate", "--checkpoint=x", "--temperature=-1"], "--temperature=-1"),
        (["generate", "--checkpoint=x", "--top_p=2"], "--top_p=2"),
        (["generate", "--checkpoint=x", "--prompt=a\udcff"], "--prompt is not UTF-8 (byte 1); convert it first"),
        (["generate", "--checkpoint=x", "--prompt=a", "--stop=\udcff"], "--stop is not UTF-8 (byte 0)"),
        (
            ["generate", "--checkpoint=x", "--prompt=a", "--eos_id=</s>"],
            "--eos_id=</s> is no list of token ids such as 1,5",
        ),
        (
            ["generate", "--checkpoint=x", "--prompt=a", "--stop_token_ids=-1"],
            "--stop_token_ids=-1 is no list of token ids",
        ),
        (["generate", "--checkpoint=x", "--dtype=int8"], "bfloat16|float32"),
        (["generate", "--checkpoint=x", "--prompt_file=no/such"], "cannot read --prompt_file=no/such"),
        (["convert", "--source=x"], "convert needs --target"),
        (["convert", "--source=x", "--target=y", "--format=gguf"], "huggingface|orbax"),
        (["bench", "--config.train.steps=3", "--suite=x"], "add --config=NAME"),
        (["bench", "--suite=x"], "<decode|eviction|generate|host_kv|kv|serve|tiers|train|vs_transformers>"),
        (["eval", "--suite=x", "--checkpoint=y"], "<kv_quant|needle|perplexity>"),
        (["completion"], "v4jax completion bash"),
        (["completion", "fish"], "v4jax completion bash"),
        (["train", "--compilation_cache=pyproject.toml/no"], "cannot use --compilation_cache=pyproject.toml/no"),
        (["train", "--config=tinny"], "did you mean 'tiny'?"),
        (["train", "--config="], "--config needs a name"),
        (["train", "--config"], "--config needs a name"),
        (["train", "--config=no/such.py"], "no config 'no/such.py'"),
    ],
)
def test_mistakes_are_one_line(capsys, argv, message):
    assert message in one_line(capsys, argv)


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.step=3", "did you mean --config.train.steps?"),
        ("trane.steps=3", "did you mean --config.train.steps?"),
        ("steps=3", "did you mean --config.train.steps?"),
        ("model.moe.n_routed_expert=3", "did you mean --config.model.moe.n_routed_experts?"),
        ("qqq=3", "groups: cache, data, mesh, model"),
        ("train=3", "is a group"),
        ("train.steps=abc", "--config.train.steps=abc is not an integer"),
        ("train.steps=1.5", "--config.train.steps=1.5 is not an integer"),
        ("train.lr=fast", "--config.train.lr=fast is not a number"),
        ("train.steps", "--config.train.steps needs a value"),
        ("model.kv_qdq=perhaps", "--config.model.kv_qdq=perhaps is not true or false"),
        ("model.layer_types=swa,cs", "model.layer_types has 'cs'"),
        ("model.layer_types=", "model.layer_types is empty"),
        ("train.steps=0", "train.steps must be at least 1"),
        ("train.lr=nan", "train.lr is nan, and must be a finite number"),
        ("cache.kv_eviction_policy=foo", "cache.kv_eviction_policy is 'foo'; one of s3fifo, lru"),
        ("cache.kv_disk_bytes=100", "cache.kv_disk_bytes and cache.kv_dir go together"),
        ("serve.max_num_batched_tokens=0", "serve.max_num_batched_tokens must be at least 1"),
        ("serve.quantization=fp7", "serve.quantization is 'fp7'; one of none, fp8"),
        ("data.source=\x1b[2J", "data.source is '\\x1b[2J', and must be a line"),
    ],
)
def test_wrong_overrides_are_one_line(capsys, config, override, message):
    assert message in one_line(capsys, ["train", f"--config={config}", f"--config.{override}"])


def test_a_prompt_file_must_be_utf8(capsys, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"abc\xff")
    argv = ["generate", "--checkpoint=x", f"--prompt_file={tmp_path / 'p.txt'}"]
    assert "is not UTF-8 (byte 3)" in one_line(capsys, argv)


@pytest.mark.parametrize("argument", ["--prompt=-", "--prompt_file=-"])
def test_stdin_must_be_utf8(capsys, monkeypatch, argument):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff\n")))
    assert f"{argument} is not UTF-8 (byte 2); convert it" in one_line(capsys, ["generate", "--checkpoint=x", argument])


def test_errors_of_the_work_itself(monkeypatch, calls, capsys):
    convert = sys.modules["v4jax.checkpoint.convert"]
    argv = ["convert", "--source=A", "--target=B"]

    def fail_with(error):
        def convert_fails(*_, **__):
            raise error

        monkeypatch.setattr(convert, "convert", convert_fails)

    fail_with(UserError("A is cut short:\n copy it again"))
    assert one_line(capsys, argv) == "v4jax: A is cut short: copy it again\n"
    with pytest.raises(UserError):
        cli.main([*argv, "--debug"])
    fail_with(OSError(28, "No space left on device", "B/part"))
    assert "no space left to write B/part" in one_line(capsys, argv)
    fail_with(KeyboardInterrupt())
    assert cli.main(argv) == 130
    assert capsys.readouterr().err == "\nv4jax: interrupted\n"
    fail_with(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        cli.main(argv)


# --- help, and the package as others see it ----------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_names_every_command(capsys, argv):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_help_of_a_command_names_every_flag(capsys, name):
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert cli.COMMANDS[name].example in out
    for flag in cli.COMMANDS[name].flags:
        [row] = [row for row in rows_of(out) if row.startswith(f"--{flag.name}=")]
        assert all(value in row for value in flag.values), row
        if flag.default not in (None, ()) or flag.shown:
            assert f"(default: {flag.shown or flag.default})" in row
    assert ("--config=NAME" in out) == ("--show_config" in out) == cli.COMMANDS[name].has_config


def rows_of(text: str) -> list[str]:
    """Entries of a help text, each with the lines that belong to it."""
    return re.sub(r"\n {20,}", " ", text).replace("\n  ", "\n").splitlines()


def test_help_says_how_large_the_presets_are(capsys):
    assert cli.main(["train", "--help"]) == 0
    rows = {row.split()[0]: row for row in rows_of(capsys.readouterr().out) if row}
    scale = {"million": 1e6, "billion": 1e9, "trillion": 1e12}
    for name in preset_names():
        said = re.search(r"(\d+(?:\.\d+)?|[Oo]ne) (million|billion|trillion) parameters", rows[name])
        parameters = (1.0 if said[1].lower() == "one" else float(said[1])) * scale[said[2]]
        assert parameters == pytest.approx(count_parameters(load(name).model).total, rel=0.06), name


def test_show_config_lists_arguments_that_give_the_same_config(capsys):
    argv = ["train", "--config=tiny", "--config.train.steps=7", "--config.data.source=a b.txt"]
    assert cli.main([*argv, "--show_config"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"--config\.train\.steps=7 +# ", out, re.M)
    assert re.search(r"--config\.train\.lr=0\.016 +# matrices \(Muon\)$", out, re.M)
    again = [argument for line in out.splitlines() for argument in shlex.split(line, comments=True)]
    command = cli.COMMANDS["train"]
    assert parse("train", command, again)[1] == parse("train", command, argv[1:])[1]
    assert cli.main(["plan", "--config=tiny", "--show_config"]) == 0  # nothing runs, so nothing is required


def test_a_config_is_found_beside_its_file(capsys, config, monkeypatch):
    folder = pathlib.Path(config).parent
    (folder / "tiny.py").write_text("raise SystemError")
    monkeypatch.chdir(folder)
    for name in ("mine", "./mine", f"{folder}/mine"):
        assert cli.main(["train", f"--config={name}:night", "--show_config"]) == 0
        assert "--config.name=night " in capsys.readouterr().out
    assert cli.main(["train", "--config=tiny", "--show_config"]) == 0  # the preset
    capsys.readouterr()
    assert "did you mean 'tiny'" in one_line(capsys, ["train", "--config=tinny"])


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == v4jax.__version__ + "\n"


def run_python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)


def test_import_and_mistakes_load_no_jax():
    code = (
        "import sys, v4jax, v4jax.config\n"
        "assert 'LLM' in dir(v4jax) and v4jax.Config is v4jax.config.Config\n"
        "light = {'jax', 'jaxlib', 'numpy', 'flax', 'absl'} & set(sys.modules)\n"
        "from v4jax import cli\n"
        "codes = [cli.main(['train', '--help']), cli.main(['train', '--config.train.step=3'])]\n"
        "print(light, codes, {'jax', 'jaxlib', 'numpy', 'flax', 'ml_collections'} & set(sys.modules))"
    )
    done = run_python(code)
    assert done.stdout.splitlines()[-1:] == ["set() [0, 1] set()"], done.stderr


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'frob'"):
        v4jax.frob  # noqa: B018


@pytest.mark.parametrize("module", ["v4jax", "v4jax.cli"])
def test_as_a_program_a_mistake_is_one_line(module):
    done = subprocess.run([sys.executable, "-m", module, "train", "--config=tinny"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == ["v4jax: no config 'tinny'; did you mean 'tiny'?"]


def test_quickstart_refuses_an_unknown_option():
    script = pathlib.Path(__file__).resolve().parents[1] / "launch/quickstart.sh"
    done = subprocess.run(["bash", str(script), "--what"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "quickstart: unknown option --what; see launch/quickstart.sh --help\n"


def test_a_reader_that_goes_away_is_no_error():
    code = "import sys\nfrom v4jax import cli\nsys.stdin.read()\nsys.exit(cli.main(['--help']))"
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    program.stdout.close()
    program.stdin.close()
    assert program.wait(timeout=60) == 141
    assert program.stderr.read() == b""
    program.stderr.close()
