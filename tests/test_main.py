"""The process around the command line: Ctrl-C ends it with 130 and one line, whenever it comes."""

import pathlib
import subprocess
import sys

import pytest

import v4jax
from tests.serve import engine_harness
from v4jax.data.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
MOMENTS = [
    "v4jax.cli",
    "jax",
    "numpy.lib._index_tricks_impl",
    "flax.nnx",
    "v4jax.serve.llm",  # imports
    "v4jax.checkpoint:load:0",
    "v4jax.serve.model_runner:ModelRunner.reset:0",
    "v4jax.serve.model_steps:prefill:0",
    "v4jax.serve.model_steps:decode:0",  # in the engine's thread, before it compiles
]
GENERATING = "v4jax.serve.model_steps:decode:5"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("interrupted") / "model"
    v4jax.save(engine_harness.draw_model(0), path, tokenizer=Tokenizer())
    return path


@pytest.mark.parametrize("moment, tiers", [*((moment, False) for moment in [*MOMENTS, GENERATING]), (GENERATING, True)])
def test_main_an_interrupt_is_130_and_one_line(checkpoint, tmp_path, moment, tiers):
    flags = ["--kv_disk_bytes=1GiB", f"--kv_dir={tmp_path / 'kv'}"] if tiers else []
    command = [
        sys.executable,
        "-m",
        "tests.interrupted",
        moment,
        "generate",
        f"--checkpoint={checkpoint}",
        "--prompt=To be",
        "--max_tokens=200",
        "--max_model_len=576",
        *flags,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("\nv4jax: interrupted\n")
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_main_an_interrupt_that_a_finalizer_swallows_comes_again():
    code = """if True:
        import signal, time
        from v4jax import cli, __main__

        signal.signal(signal.SIGINT, signal.default_int_handler)

        class Swallows:
            def __del__(self):
                raise KeyboardInterrupt

        def main():
            Swallows()
            time.sleep(60)

        cli.main = main
        __main__.run()
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "\nv4jax: interrupted\n")
