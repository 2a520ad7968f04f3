"""Paths that users give: a URL is one clear line, and no local folder is made of it."""

import dataclasses
import os
import pathlib

import pytest

from v4jax import cli, config
from v4jax.core.errors import UserError
from v4jax.core.paths import local_path


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


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--workdir=gs://b/r"],
        ["train", "--config.data.source=gs://b/x.txt"],
        ["train", "--config.data.heldout=s3://b/x.txt"],
        ["train", "--config.data.tokenizer=gs://b/t.json"],
        ["train", "--config.mesh.rules=gs://b/l.py"],
        ["train", "--config=gs://b/c.py"],
        ["generate", "--checkpoint=gs://b/r", "--prompt=x"],
        ["generate", "--checkpoint=x", "--prompt_file=gs://b/p"],
        ["generate", "--checkpoint=x", "--prompt=x", "--kv_dir=gs://b/kv"],
        ["convert", "--source=hf://o/r", "--target=x"],
        ["convert", "--source=x", "--target=gs://b/r"],
        ["plan", "--topology=h100:8", "--json=gs://b/x.json"],
        ["bench", "--suite=kv", "--json=gs://b/x.json"],
        ["bench", "--suite=kv", "--plot=gs://b/x.png"],
        ["eval", "--suite=perplexity", "--checkpoint=gs://b/r"],
    ],
)
def test_every_path_of_the_command_line(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "is a URL" in err
    assert os.listdir(tmp_path) == []


def test_every_path_of_the_library(tmp_path, monkeypatch):
    from v4jax import checkpoint
    from v4jax.checkpoint import directory, model_io
    from v4jax.core import atomic
    from v4jax.data.sources import find_files
    from v4jax.train.loop import train

    monkeypatch.chdir(tmp_path)
    tiny = config.load("tiny")
    for attempt in [
        lambda: checkpoint.load("gs://b/r"),
        lambda: checkpoint.load_config("gs://b/r"),
        lambda: model_io.open_checkpoint("gs://b/r"),
        lambda: directory.save_config("gs://b/r", tiny),
        lambda: checkpoint.TrainCheckpointer("gs://b/r", tiny, keep=1),
        lambda: train(tiny, "gs://b/r"),
        lambda: find_files("gs://b/*.txt"),
        lambda: atomic.replace_directory("gs://b/r", "x", bool).__enter__(),
        lambda: config.validate(
            dataclasses.replace(tiny, cache=config.Cache(kv_disk_bytes=1 << 30, kv_dir="gs://b/kv"))
        ),
    ]:
        with pytest.raises(UserError, match="is a URL"):
            attempt()
    assert os.listdir(tmp_path) == []
