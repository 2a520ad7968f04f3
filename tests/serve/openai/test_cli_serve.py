"""`v4jax serve`: its flags, and a process from the first request to SIGTERM."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import urllib.request

import pytest

from v4jax import checkpoint, cli
from v4jax.cli_serve import SETTINGS_FLAGS
from v4jax.serve.openai.settings import Settings

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_every_setting_has_a_flag_with_its_default():
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert {flag.name for flag in SETTINGS_FLAGS} == set(defaults)
    for flag in SETTINGS_FLAGS:
        assert flag.default == (defaults[flag.name] or flag.default), flag.name
    assert {flag.name for flag in SETTINGS_FLAGS} <= {flag.name for flag in cli.COMMANDS["serve"].flags}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_server_drains_at_sigterm_and_exits_with_0(model, tokenizer, tmp_path):
    directory = tmp_path / "tiny"
    checkpoint.save(model, directory)
    tokenizer.save(directory)
    argv = [sys.executable, "-m", "v4jax", "serve", f"--checkpoint={directory}", "--port=0", "--max_model_len=576"]
    argv += ["--max_num_seqs=4", "--max_num_batched_tokens=64"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(argv, cwd=ROOT, env=environment, text=True, stdout=-1, stderr=-1) as process:
        try:
            url = process.stdout.readline().split()[-1]
            body = {"prompt": [5, 6], "max_tokens": 500, "ignore_eos": True, "stream": True}
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=120) as response:
                first = response.readline()
                process.send_signal(signal.SIGTERM)
                text = first + response.read()
            assert text.endswith(b"data: [DONE]\n\n") and b'"model":"tiny"' in text
            assert process.wait(60) == 0, process.stderr.read()
        finally:
            process.kill()
        assert "Traceback" not in process.stderr.read()
