"""The files of launch/ are whole: shells parse, manifests hold what v4jax reads, images copy what exists."""

import pathlib
import re
import subprocess

import pytest

from v4jax.cli import COMMANDS
from v4jax.cli_flags import parse
from v4jax.parallel.distributed import ProcessInfo, detect_process

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
yaml = pytest.importorskip("yaml", reason="reading manifests needs PyYAML, which comes with ml_collections")


@pytest.mark.parametrize("path", [*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")], ids=lambda path: path.name)
def test_shells_parse_and_stop_at_the_first_error(path):
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "set -euo pipefail" in path.read_text() or path.name == "environment.sh"


@pytest.mark.parametrize("path", list(LAUNCH.glob("gke/*.yaml")), ids=lambda path: path.name)
def test_jobsets_give_every_pod_its_place_and_a_command_that_parses(path):
    job = yaml.safe_load(path.read_text())
    assert job["kind"] == "JobSet" and job["spec"]["failurePolicy"]["maxRestarts"] > 0
    [replicated] = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    program, command = container["command"]
    values, config = parse(command, COMMANDS[command], container["args"])
    assert program == "v4jax" and config.mesh.rules == "pod" and values.workdir.startswith("/runs/")
    if "google.com/tpu" not in container["resources"]["limits"]:
        environment = {entry["name"]: entry.get("value", "3") for entry in container["env"]}
        host = f"{job['metadata']['name']}-{replicated['name']}-0-0.{job['spec']['network']['subdomain']}:29400"
        assert detect_process(environment) == ProcessInfo("environment", host, spec["parallelism"], 3)


@pytest.mark.parametrize("path", list(LAUNCH.glob("docker/*.Dockerfile")), ids=lambda path: path.name)
def test_images_copy_what_exists_and_start_v4jax(path):
    text = path.read_text()
    for source in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((LAUNCH.parent / name).exists() for name in source.split())
    assert 'ENTRYPOINT ["v4jax"]' in text and text.count("FROM ") == 1
    extra = re.search(r"pip install '?\.(?:\[(\w+)\])?", text)[1]
    assert extra in (None, "tpu", "cuda")


def test_every_file_says_for_which_hardware_it_is():
    for path in [*LAUNCH.glob("*/*")]:
        assert "# Hardware: " in path.read_text() or "Hardware: " in path.read_text(), path
