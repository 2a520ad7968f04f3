"""Paths that users give: a URL is one clear line, and no local folder is made of it."""

import ast
import dataclasses
import os
import pathlib

import pytest
from absl import flags

from v4jax import cli, config
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path

ROOT = pathlib.Path(__file__).resolve().parents[2]
URL = "gs://bucket/x"
TEXT = (flags.DEFINE_string, flags.DEFINE_multi_string, flags.DEFINE_list)
NO_PATHS = {  # flags of text that name neither a file nor a directory
    "allowed_origins": "web origins",
    "allowed_token_ids": "numbers",
    "bad_words": "text",
    "bounds": "numbers",
    "contexts": "numbers",
    "coordinator": "HOST:PORT",
    "eos_id": "numbers",
    "host": "an address",
    "kv_cache_dtype": "a name",
    "local_devices": "numbers",
    "mesh": "a name",
    "prompt": "text",
    "served_model_name": "a name",
    "stop": "text",
    "stop_token_ids": "numbers",
    "topology": "a name",
}
ALL_FLAGS = [(name, flag) for name, command in cli.COMMANDS.items() for flag in command.flags]
# Functions that make directories of paths that others have checked, as "file: function", and who checks.
CHECKED_BEFORE = {
    "train/workdir_lock.py: workdir_lock": "train.loop.train",
    "checkpoint/extra_files.py: copy_to": "the directory that core.atomic.replace_directory yields",
    "checkpoint/orbax.py: _open": "checkpoint.directory.save_config, which the constructor calls",
    "checkpoint/export.py: _write_checksums": "the directory that core.atomic.replace_directory yields",
}


@pytest.mark.parametrize("path", ["runs/a", "/abs:olute/x", "./gs:/x", "a:b", "C:/windows", "with space", ""])
def test_local_paths_pass(path):
    assert local_path(path, "--workdir") == pathlib.Path(path)


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://b/r", "GS://b", "hf://o/r", pathlib.Path("gs://bucket/run")])
def test_urls_are_refused_with_the_cure(path):
    with pytest.raises(UserError, match="--workdir .* is a URL, .*mount the bucket"):
        local_path(path, "--workdir")


def test_a_file_url_is_refused_with_the_cure():
    with pytest.raises(UserError, match="give the path without file://"):
        local_path("file:///tmp/x", "--workdir")


def is_refused(argv, capsys, tmp_path):
    assert cli.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "is a URL" in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name, flag", ALL_FLAGS, ids=lambda part: part if isinstance(part, str) else part.name)
def test_every_flag_is_a_path_or_none(name, flag, capsys, tmp_path, monkeypatch):
    """A new flag of text is declared with `define_path`, or joins NO_PATHS."""
    if not flag.is_path:
        assert flag.define not in TEXT or flag.name in NO_PATHS, f"{flag.name}: declare a path with define_path"
        return
    needed = {
        other.name: (other.values or ("x",))[0] for other in cli.COMMANDS[name].flags if "required" in other.options
    }
    monkeypatch.chdir(tmp_path)
    is_refused([name, *(f"--{key}={value}" for key, value in (needed | {flag.name: URL}).items())], capsys, tmp_path)


def test_every_text_of_a_config_is_a_path_a_choice_or_refused(tmp_path, monkeypatch, capsys):
    """No field of a config takes a URL, so that none can become a directory."""
    tiny, texts = config.load("tiny"), []

    def walk(part, place):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if dataclasses.is_dataclass(value):
                walk(value, [*place, field.name])
            elif isinstance(value, str):
                texts.append(".".join([*place, field.name]))

    walk(tiny, [])
    assert {"name", "data.source", "data.heldout", "data.tokenizer", "cache.kv_dir", "mesh.rules"} <= set(texts)
    monkeypatch.chdir(tmp_path)
    for text in texts:
        assert cli.main(["train", "--config=tiny", f"--config.{text}={URL}"]) == 1, text
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and URL in err
    is_refused(["train", "--config=gs://b/c.py"], capsys, tmp_path)


def library(tiny):
    """Attempts to name a URL wherever the library takes a path."""
    from v4jax import LLM, Tokenizer, checkpoint, evals
    from v4jax.cache.offload.disk_tier import DiskTier
    from v4jax.checkpoint import convert, directory, model_io
    from v4jax.core import atomic, compilation_cache, reporting
    from v4jax.data import build_corpus
    from v4jax.data.sources import find_files
    from v4jax.tools import bench, plan
    from v4jax.train.loop import train

    cached = dataclasses.replace(tiny, cache=config.Cache(kv_disk_bytes=1 << 30, kv_dir=URL))
    return {
        "load": lambda: checkpoint.load(URL),
        "load_config": lambda: checkpoint.load_config(URL),
        "open_checkpoint": lambda: model_io.open_checkpoint(URL),
        "write huggingface": lambda: model_io.write(URL, "huggingface", tiny, {}),
        "write orbax": lambda: model_io.write(URL, "orbax", tiny, {}),
        "save_config": lambda: directory.save_config(URL, tiny),
        "TrainCheckpointer": lambda: checkpoint.TrainCheckpointer(URL, tiny, keep=1),
        "convert from": lambda: convert.convert(URL, "x"),
        "convert to": lambda: (directory.save_config("model", tiny), convert.convert("model", URL)),
        "train": lambda: train(tiny, URL),
        "find_files": lambda: find_files("gs://b/*.txt"),
        "replace_directory": lambda: atomic.replace_directory(URL, "x", bool).__enter__(),
        "validate": lambda: config.validate(cached),
        "check_serving": lambda: config.check_serving(cached.model, cached.serve, cached.cache),
        "DiskTier": lambda: DiskTier(URL, 1 << 20, "lru"),
        "LLM": lambda: LLM(URL),
        "LLM kv_dir": lambda: (
            directory.save_config("model", tiny),
            LLM("model", kv_disk_bytes=1 << 30, kv_dir=URL),
        ),
        "Tokenizer": lambda: Tokenizer(URL),
        "Tokenizer.save": lambda: Tokenizer().save(URL),
        "eval of": lambda: evals.run("perplexity", URL),
        "eval json": lambda: evals.run("perplexity", "x", json=URL),
        "eval data": lambda: evals.run("perplexity", "x", data=URL),
        "eval heldout": lambda: evals.run("perplexity", "x", heldout=URL),
        "bench of": lambda: bench.run("host_kv", checkpoint=URL),
        "bench json": lambda: bench.run("kv", json=URL),
        "bench plot": lambda: bench.run("decode", plot=URL),
        "plan json": lambda: plan.run(tiny, "h100:8", analytic=True, json=URL),
        "write_json": lambda: reporting.write_json(URL, []),
        "compilation_cache": lambda: compilation_cache.enable(URL),
        "build_corpus": lambda: build_corpus.build(None, None, URL),
    }


@pytest.mark.parametrize("attempt", library(config.load("tiny")))
def test_every_path_of_the_library(attempt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is a URL"):
        library(config.load("tiny"))[attempt]()
    assert not [name for name in os.listdir(tmp_path) if name != "model"] and capsys.readouterr().out == ""


def makers_of_directories(root: pathlib.Path) -> dict[str, bool]:
    """{"file: function": whether it calls `local_path` itself} of the functions that make named directories."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                called = {
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                    for node in ast.walk(function)
                    if isinstance(node, ast.Call)
                }
                if called & {"mkdir", "makedirs"}:
                    found[f"{path.relative_to(root).as_posix()}: {function.name}"] = "local_path" in called
    return found


def test_whoever_makes_a_directory_checks_its_path():
    found = makers_of_directories(ROOT / "v4jax")
    assert {name for name, checks in found.items() if not checks} == set(CHECKED_BEFORE)
    assert len(found) > len(CHECKED_BEFORE) + 4


def test_maker_finder_sees_a_planted_breach(tmp_path):
    (tmp_path / "a.py").write_text(
        "def f(path):\n    path.mkdir()\ndef g(path):\n    os.makedirs(local_path(path, 'x'))\n"
    )
    assert makers_of_directories(tmp_path) == {"a.py: f": False, "a.py: g": True}
