"""Objects in processes of their own: calls, errors as one line, and no process left behind.

The objects are modules of the standard library, whose functions serve as methods.
"""

import importlib
import os
import signal
import subprocess
import sys

import pytest

from v4jax import config
from v4jax.core.errors import UserError
from v4jax.tools.bench.subprocess_runner import remote

pytestmark = pytest.mark.multiprocess


def test_calls_run_elsewhere_and_errors_come_back_as_one_line():
    with remote("arm", importlib.import_module, "os", heap=True) as ask:
        pid = ask("getpid")
        assert pid != os.getpid() and ask("getppid") == os.getpid()
        assert ask("fspath", "a/b") == "a/b"
        with pytest.raises(UserError) as caught:
            ask("listdir", "no/such")
        assert str(caught.value) == "arm: FileNotFoundError: [Errno 2] No such file or directory: 'no/such'"
        assert "Traceback" in caught.value.__notes__[0]  # what --debug shows
        assert ask("getpid") == pid  # it goes on
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_other_process_starts_without_jax():
    """Nothing of one arm shall lie beside the other."""
    with remote("arm", importlib.import_module, "builtins") as ask:
        assert ask("eval", "{'jax', 'numpy', 'torch'} & set(__import__('sys').modules)") == set()


def test_an_error_of_a_user_is_told_as_it_is():
    with pytest.raises(UserError) as caught, remote("arm", config.load, "tinny"):
        pytest.fail("the object could not be made, and its block was entered")
    assert str(caught.value) == "no config 'tinny'; did you mean 'tiny'?"


def test_a_bug_keeps_its_traceback_and_death_is_told(capfd):
    with remote("arm", importlib.import_module, "os") as ask:
        with pytest.raises(UserError, match="^the process of arm ended with exit code 1; its own message is above$"):
            ask("no_such_method")
        with pytest.raises(UserError, match="exit code 1"):
            ask("getpid")
    assert "has no attribute 'no_such_method'" in capfd.readouterr().err
    with remote("arm", importlib.import_module, "os") as ask:
        with pytest.raises(UserError, match="^the process of arm ended with signal 9; perhaps memory ran out$"):
            ask("kill", ask("getpid"), signal.SIGKILL)


@pytest.mark.parametrize("end", ["kill", "interrupt"])
def test_it_ends_with_its_parent_in_the_middle_of_a_call(end):
    code = (
        "import importlib\n"
        "from v4jax.tools.bench.subprocess_runner import remote\n"
        "with remote('arm', importlib.import_module, 'time') as ask:\n"
        "    print('ready', ask('time') > 0, flush=True)\n"
        "    ask('sleep', 600)\n"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert program.stdout.readline() == "ready True\n"
    if end == "kill":
        program.kill()
    else:
        os.killpg(program.pid, signal.SIGINT)
    # Both streams are inherited, so they end when the last process has.
    out, err = program.communicate(timeout=60)
    assert program.returncode == (-signal.SIGKILL if end == "kill" else -signal.SIGINT) and out == ""
    assert err.count("Traceback") == (end == "interrupt")
