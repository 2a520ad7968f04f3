"""What the scripts of launch/ do, with stand-ins for the programs of a cluster."""

import os
import pathlib
import subprocess

import pytest

from v4jax.parallel.distributed import ProcessInfo, detect_process

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


@pytest.fixture
def run(tmp_path):
    """Run a script with stand-ins {program: shell text} first on PATH. Each call of one is a line of the list."""
    log = tmp_path / "log"

    def run(script, *arguments, programs, **environment):
        (tmp_path / "bin").mkdir(exist_ok=True)
        for name, text in programs.items():
            path = tmp_path / "bin" / name
            path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >> {log}\n{text}\n')
            path.chmod(0o755)
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(LAUNCH / script), *arguments],
            env={**os.environ, "PATH": path, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return done, log.read_text().splitlines() if log.exists() else []

    return run


SLURM = {"SLURM_CPUS_PER_TASK": "96", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    "status, restarts, queued",
    [
        (0, 0, False),
        (1, 0, False),
        (143, 0, True),
        (75, 3, True),
        (137, 0, True),
        (143, 50, False),
    ],
)
def test_slurm_puts_back_what_can_go_on(run, tmp_path, status, restarts, queued):
    programs = {"srun": f"exit {status}", "scontrol": ""}
    done, calls = run(
        "slurm/train.sbatch",
        "--config=x",
        programs=programs,
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_RESTART_COUNT=str(restarts),
        **SLURM,
    )
    assert done.returncode == status, done.stderr
    assert calls[0].startswith("srun --cpus-per-task=96 ") and calls[0].endswith("--join_timeout=600 --config=x")
    assert calls[1:] == (["scontrol requeue 7"] if queued else [])


def metadata(index: int, hosts: str) -> str:
    """A stand-in for curl that answers as the metadata server of a TPU VM."""
    return f'case $* in *agent-worker-number) echo {index} ;; *worker-network-endpoints) printf "%s" "{hosts}" ;; esac'


@pytest.mark.parametrize(
    "hosts, first",
    [
        ("unknown:0:10.0.0.2,unknown:1:10.0.0.3", "10.0.0.2"),
        ("host-0,host-1", "host-0"),
    ],
)
def test_tpu_hosts_find_each_other_by_the_metadata(run, hosts, first):
    programs = {"curl": metadata(1, hosts), "sudo": ""}
    done, calls = run("tpu_vm/start.sh", "train", "--config=a b", programs=programs)
    assert done.returncode == 0, done.stderr
    [started] = [call for call in calls if call.startswith("sudo systemd-run ")]
    assert "--unit=v4jax " in started and "train --config=a b --workdir=" in started
    variables = dict(word[9:].split("=", 1) for word in started.split() if word.startswith("--setenv="))
    assert detect_process(variables) == ProcessInfo("environment", f"{first}:29400", 2, 1)


def test_a_single_tpu_host_is_a_process_alone(run):
    done, calls = run("tpu_vm/start.sh", "train", programs={"curl": metadata(0, "host-0"), "sudo": ""})
    assert done.returncode == 0 and "JAX_" not in "".join(calls), done.stderr


def test_setup_takes_gcsfuse_from_its_repository_and_a_newer_python(run, tmp_path):
    (tmp_path / ".local/bin").mkdir(parents=True)
    uv = tmp_path / ".local/bin/uv"
    uv.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "uv $*" >> {tmp_path / "log"}\n')
    uv.chmod(0o755)
    programs = {"curl": "echo key", "lsb_release": "echo jammy", "mountpoint": "exit 1", "python3": "", "gcsfuse_": ""}
    # The real gcsfuse is installed by apt-get; here the stand-in for sudo makes it.
    installs = f"[[ $* != *install* ]] || ln -sf gcsfuse_ {tmp_path}/bin/gcsfuse"
    programs["sudo"] = f"{installs}; [[ $1 != tee ]] || cat > /dev/null"
    done, calls = run("tpu_vm/setup.sh", "BUCKET", "a/b", programs=programs, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "sudo tee /etc/apt/sources.list.d/gcsfuse.list" in calls
    assert "gcsfuse_ --implicit-dirs --only-dir=a/b BUCKET runs" in calls
    assert "uv venv --quiet --python=3.12 venv" in calls


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("a", "b", "bucket", "train"),
        ("a", "b", "gs://x/y"),
        ("a", "b", "gs://x", "train"),
    ],
)
def test_tpu_train_wants_a_bucket_and_a_command(run, arguments):
    done, calls = run("tpu_vm/train.sh", *arguments, programs={"gcloud": ""})
    assert done.returncode == 1 and calls == [] and done.stderr.startswith("train.sh: usage: ")


def test_tpu_train_starts_on_all_hosts_and_returns(run):
    programs, command = {"gcloud": ""}, ("gs://bucket/a/b", "train", "--config=x y")
    done, calls = run("tpu_vm/train.sh", "pod", "zone", *command, programs=programs)
    assert done.returncode == 0, done.stderr
    assert [call.split()[4] for call in calls] == ["scp", "ssh", "ssh"] and all("--worker=all" in c for c in calls)
    assert "setup.sh bucket a/b" in calls[1] and r"start.sh train --config=x\ y" in calls[2]
    done, calls = run("tpu_vm/train.sh", "pod", "zone", "stop", programs=programs)
    assert "systemctl stop v4jax" in calls[-1]
